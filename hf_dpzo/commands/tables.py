"""Tables for people: aligned columns of text."""

from collections.abc import Sequence


def table(rows: Sequence[tuple[str, ...]]) -> str:
    r"""Return `rows`, of equally many cells each, as lines of aligned columns.

    >>> table([("epsilon", "2"), ("delta", "1e-05")])
    'epsilon  2\ndelta    1e-05\n'
    """
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def printable(text: str) -> str:
    """What strangers wrote moves no cursor."""
    return "".join(one if one.isprintable() else "?" for one in text)
