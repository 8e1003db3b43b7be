"""Tables for people: aligned columns of text."""

from collections.abc import Sequence


def table(rows: Sequence[tuple[str, ...]]) -> str:
    r"""Return `rows`, of equally many cells each, as lines of aligned columns.

    >>> table([("epsilon", "2"), ("delta", "1e-05")])
    'epsilon  2\ndelta    1e-05\n'
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)
