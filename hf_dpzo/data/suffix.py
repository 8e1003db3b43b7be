"""How many of a row's last tokens an activated adapter can change, by a rule about that row alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


# The label of a token without a target.
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class SuffixRule:
    """Measures what begins with a row's last invocation.

    Args:
        invocation: the tokens that activate the adapter.
        ends_together: whether the loss reads the last place of a batch, so that no padding may be behind suffixes.

    >>> rule = SuffixRule(invocation=(5, 6))
    >>> rule.measure({"input_ids": [1, 5, 6, 7], "labels": [-100, -100, -100, 7]})
    3
    >>> rule.measure({"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}) is None
    True
    """

    invocation: tuple[int, ...]
    ends_together: bool = False

    def measure(self, row: Any) -> int | None:
        """Return the number of tokens from the last invocation on; `None` for a row that is evaluated as a whole.

        That is one without an invocation, or with a target up to the invocation's first token. These are predicted
        from tokens before it.
        """
        tokens, labels = (_list_integers(row, name) for name in ("input_ids", "labels"))
        size = len(self.invocation)
        places = range(len(tokens) - size, -1, -1)
        place = next((place for place in places if tuple(tokens[place : place + size]) == self.invocation), None)
        are_targets = len(labels) == len(tokens)
        if place is None or (are_targets and any(label != _IGNORED for label in labels[: place + 1])):
            return None
        return len(tokens) - place

    def choose_length(self, row: Any, *, fixed_shapes: bool) -> int | None:
        """Return the length that suffixes in one micro-batch with that of `row` are filled up to.

        It is zero for that of the longest of them, and `None` for a row that is evaluated as a whole.

        Args:
            row: the row.
            fixed_shapes: whether shapes must depend on the row alone.
        """
        length = self.measure(row)
        if length is None or self.ends_together:
            return length
        return round_length(length) if fixed_shapes else 0


def round_length(length: int) -> int:
    """Return the public length to which a suffix of `length` tokens is filled up: four at least.

    It is the next power of two, or three quarters of it, if that is enough.

    >>> [round_length(length) for length in (1, 4, 5, 7, 20, 33, 49)]
    [4, 4, 6, 8, 24, 48, 64]
    """
    power = max(4, 1 << (length - 1).bit_length())
    return 3 * power // 4 if power > 4 and length <= 3 * power // 4 else power


def _list_integers(row: Any, name: str) -> list[int]:
    """Return a field of `row` that holds integers, as a list; an empty one if it is missing or holds something else."""
    value = row.get(name) if isinstance(row, Mapping) else None
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    return value if isinstance(value, list) and all(type(one) is int for one in value) else []
