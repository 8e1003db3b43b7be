"""The output of commands: tables of aligned columns, and an exit status."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    r"""Return `rows`, which have the same number of cells, as lines of aligned columns.

    >>> format_table([("epsilon", "2"), ("delta", "1e-05")])
    'epsilon  2\ndelta    1e-05\n'
    """
    rows = [tuple(map(make_printable, row)) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def make_printable(text: str) -> str:
    """Replace characters by which a stranger's text could move the cursor or forge lines."""
    return "".join(character if character.isprintable() else "?" for character in text)


# The type that `add_subparsers` returns. argparse has no public name for it.
Subparsers = argparse._SubParsersAction


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The standard output of a command, and its exit status.

    Args:
        text: whole lines for standard output.
        status: 0 if all is well, 1 if a claim does not hold, 3 if it could not be checked.
    """

    text: str
    status: int = 0
