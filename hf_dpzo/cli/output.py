"""Tables for people: aligned columns of text."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    r"""Return `rows`, of equally many cells each, as lines of aligned columns.

    >>> format_table([("epsilon", "2"), ("delta", "1e-05")])
    'epsilon  2\ndelta    1e-05\n'
    """
    rows = [tuple(map(make_printable, row)) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def make_printable(text: str) -> str:
    """What strangers wrote moves no cursor."""
    return "".join(one if one.isprintable() else "?" for one in text)


# What `add_subparsers` returns, which argparse has no public name for.
Subparsers = argparse._SubParsersAction


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command says on standard output, and the exit status that it ends with.

    Args:
        text: whole lines.
        status: 0 where all is well, 1 where a claim does not hold, 3 where it could not be checked.
    """

    text: str
    status: int = 0
