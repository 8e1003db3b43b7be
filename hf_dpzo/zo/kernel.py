"""A kernel that adds signs to parameters in one pass over memory, compiled by Numba where it is installed.

NumPy needs two passes: one builds the signs, the other adds them. It is the reference, and the kernel's bits are equal.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np


# With more directions than this, which no run uses, the kernel takes one at a time: their words would fill the memory.
MAX_DIRECTIONS_AT_ONCE = 256


# The signature of `add_signs`: (target, words, weights) -> None.
Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@lru_cache
def compile_kernel() -> Kernel | None:
    """Return `add_signs` compiled, which takes a third of a second, or `None` if Numba cannot be imported."""
    try:
        import numba
    except ImportError:  # Numba raises it too if NumPy is too new for it.
        return None
    return numba.njit("void(float32[::1], uint64[:, ::1], float32[::1])", nogil=True)(add_signs)


def add_signs(target: np.ndarray, words: np.ndarray, weights: np.ndarray) -> None:
    """Add `sum_k weights[k] * z_k` to `target`, where bit j of `words[k, i]` is set if `z_k[64 i + j]` is minus one.

    The sum over k is taken in float32, in the order of k. Adding it rounds the target once.

    Args:
        target: float32 `[size]`, changed in place.
        words: uint64 `[directions, ceil(size / 64)]`.
        weights: float32 `[directions]`, one or more.

    >>> target = np.zeros(3, dtype=np.float32)
    >>> add_signs(target, np.array([[0b110]], dtype=np.uint64), np.array([2], dtype=np.float32))
    >>> target.tolist()
    [2.0, -2.0, -2.0]
    """
    total = np.empty(64, dtype=np.float32)
    for word in range(words.shape[1]):
        bits, weight = words[0, word], weights[0]
        for j in range(64):
            total[j] = -weight if (bits >> np.uint64(j)) & np.uint64(1) else weight
        for k in range(1, weights.size):
            bits, weight = words[k, word], weights[k]
            for j in range(64):
                total[j] += -weight if (bits >> np.uint64(j)) & np.uint64(1) else weight
        start = 64 * word
        if start + 64 <= target.size:  # A loop of constant length compiles to vector instructions.
            for j in range(64):
                target[start + j] += total[j]
        else:
            for j in range(target.size - start):
                target[start + j] += total[j]


def add_rows(piece: np.ndarray, rows: Iterable[np.ndarray], weights: np.ndarray, kernel: Kernel) -> None:
    """Add the directions whose words are `rows` to `piece`, a chunk of a parameter, in place.

    Args:
        piece: float32 `[size]`, changed in place.
        rows: the words of each direction, uint64 `[ceil(size / 64)]`. All are taken.
        weights: float32 `[directions]`, one or more.
        kernel: `add_signs`, compiled.

    >>> piece = np.zeros(2, dtype=np.float32)
    >>> add_rows(piece, [np.array([0b01], dtype=np.uint64)], np.array([2], dtype=np.float32), add_signs)
    >>> piece.tolist()
    [-2.0, 2.0]
    """
    if len(weights) == 1:
        (row,) = rows
        kernel(piece, row[None], weights)
        return
    if len(weights) <= MAX_DIRECTIONS_AT_ONCE:
        words = np.empty((len(weights), math.ceil(len(piece) / 64)), dtype=np.uint64)
        for place, row in enumerate(rows):
            words[place] = row
        kernel(piece, words, weights)
        return
    total = np.full(len(piece), -0.0, dtype=np.float32)  # Adding to minus zero changes no bit.
    for number, row in enumerate(rows):
        kernel(total, row[None], weights[number : number + 1])
    piece += total
