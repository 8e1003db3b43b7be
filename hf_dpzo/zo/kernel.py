"""A kernel that adds signs to parameters in one pass over memory, compiled by Numba where it is installed.

NumPy needs two passes: one builds the signs, the other adds them. It is the reference, and the kernel's bits are equal.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np


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
