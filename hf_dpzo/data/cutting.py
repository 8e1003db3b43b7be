"""Cuts the rows of a batch into micro-batches, so that a row decides only how few others are cut.

A row's loss may depend on its micro-batch, by rounding. If rows were sorted and filled in one after the other, a row
more would move all those after it to other micro-batches, and so move a whole batch of losses.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hf_dpzo.data.pairs import is_pair, list_sequences
from hf_dpzo.data.sampling import KEY_BITS, FetchedRow


# The number of bits of a digest of a row's content.
_DIGEST_BITS = 64


def cut_into_micro_batches(rows: Sequence[FetchedRow], size: int) -> Iterator[tuple[FetchedRow, ...]]:
    """Yield the micro-batches of `rows`, each of at most `size` rows of similar length, the shortest rows first.

    Each row has a number that depends on no other row: its length, then a digest of its content, then its secret random
    key. The numbers up to the largest are halved, and each half again, until at most `size` rows lie in each part.
    Parts without rows are left out. Rows of equal numbers, which random keys rule out, are filled in one by one.

    Guarantee: a row more or less changes the micro-batches of at most `size` other rows; of none if `size` is 1. For
    whether an interval is halved depends only on how many rows lie in it, and only the intervals that hold the row's
    own number count one row more. Those that were halved without it are halved with it. So all that changes is in the
    one part in which its number lies, which held at most `size` rows, and may now be halved further.

    Args:
        rows: the rows to cut, in any order.
        size: the largest number of rows in a micro-batch.

    >>> rows = [FetchedRow(unit=0, row={"input_ids": [7] * length}, slot=0) for length in (9, 2, 8, 3)]
    >>> [[count_tokens(row.row) for row in part] for part in cut_into_micro_batches(rows, 2)]
    [[2, 3], [8, 9]]
    """
    numbered = sorted(((_number_row(row), row) for row in rows), key=lambda pair: pair[0])
    waiting = [numbered]
    while waiting:
        part = waiting.pop()
        if len(part) <= size:
            if part:
                yield _restore_order(part)
            continue
        first, last = part[0][0], part[-1][0]
        if first == last:
            waiting += [part[start : start + size] for start in reversed(range(0, len(part), size))]
            continue
        # All halvings above the highest bit in which the numbers differ leave the part whole.
        bit = (first ^ last).bit_length() - 1
        upper = last >> bit << bit
        middle = bisect_left(part, upper, key=lambda pair: pair[0])
        waiting += [part[middle:], part[:middle]]


# The columns of what is padded to the longest row of a batch: tokens, or the samples or frames of a sound.
_PADDED_COLUMNS = ("input_ids", "input_values", "input_features")


def count_tokens(row: Any) -> int:
    """Return the number of tokens in a row, or of its samples or frames; of several texts, that of the longest.

    It is 0 for a row without any.

    >>> count_tokens({"input_ids": [5, 6, 7]}), count_tokens({"input_ids": [[5], [6, 7]]}), count_tokens({"x": 1.0})
    (3, 2, 0)
    """
    if not isinstance(row, dict):
        return 0
    tokens = next((row[name] for name in _PADDED_COLUMNS if name in row), None)
    try:
        if is_pair(row):
            return max(map(len, list_sequences(row)))
        is_nested = "input_ids" in row and isinstance(tokens[0], list | tuple | torch.Tensor | np.ndarray)
        # A tensor of one token has no length.
        return max(len(text) for text in tokens) if is_nested and np.ndim(tokens[0]) else len(tokens)
    except Exception:  # A number or a scalar tensor has no length, and no other error may show either.
        return 0


def digest_content(row: Any) -> int:
    """Return 64 bits that follow from the content of `row`; objects of unknown types count by the names of these.

    >>> digest_content({"input_ids": [5, 6]}) == digest_content({"input_ids": [5, 6]})
    True
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BITS // 8)
    try:
        _add_content(digest, row)
    except Exception:  # For example a number of too many digits, or a tensor without storage.
        return 0
    return int.from_bytes(digest.digest(), "big")


def _number_row(row: FetchedRow) -> int:
    """Return the number of a row in a public order, which follows from the row alone."""
    length = count_tokens(row.row)
    return length << (_DIGEST_BITS + KEY_BITS) | digest_content(row.row) << KEY_BITS | row.key


def _restore_order(part: Sequence[tuple[int, FetchedRow]]) -> tuple[FetchedRow, ...]:
    """Return the rows of a micro-batch by length, and rows of one length in the order in which they were drawn."""
    return tuple(sorted((row for _, row in part), key=lambda row: (count_tokens(row.row), row.slot)))


# Types whose values have a text that is the same for the same value, in any process.
_PLAIN_TYPES = {bool, bytes, float, int, str, type(None)}


def _add_content(digest: Any, value: Any) -> None:
    """Add `value` to a digest. No code of a user's type is run, because it may fail, print or draw."""
    kind = type(value)
    if kind is dict:
        for name, item in value.items():
            _add_content(digest, name)
            _add_content(digest, item)
    elif kind in (list, tuple) and not set(map(type, value)) <= _PLAIN_TYPES:
        for item in value:
            _add_content(digest, item)
    elif kind in (torch.Tensor, np.ndarray):
        if kind is torch.Tensor:  # NumPy has no bfloat16.
            value = (value.double() if value.is_floating_point() else value).detach().cpu().numpy()
        digest.update(value.tobytes() if value.dtype != object else b"")
    elif kind in (list, tuple) or kind in _PLAIN_TYPES or isinstance(value, np.generic):
        digest.update(repr(value).encode())
    digest.update(kind.__name__.encode() + b";")
