"""Adding signs to parameters in one pass over memory, by a function that Numba compiles, where it is installed.

NumPy needs two passes: one makes the signs, another one adds them. It is the reference: the bits are the same.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np


# (target, words, weights) -> None; see `add_signs`.
Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@lru_cache
def compile_kernel() -> Kernel | None:
    """Return `add_signs` compiled, which takes a third of a second; `None` where Numba is not to be had."""
    try:
        import numba
    except ImportError:  # Also what Numba raises next to a NumPy that is too new for it.
        return None
    return numba.njit("void(float32[::1], uint64[:, ::1], float32[::1])", nogil=True)(add_signs)


def add_signs(target: np.ndarray, words: np.ndarray, weights: np.ndarray) -> None:
    """Add `sum_k weights[k] * z_k` to `target`, where bit j of `words[k, i]` says that `z_k[64 i + j]` is minus one.

    The sum over k is taken in float32, in the order of k, and rounded into the target once.

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
        if start + 64 <= target.size:  # A loop of known length is compiled to vector instructions.
            for j in range(64):
                target[start + j] += total[j]
        else:
            for j in range(target.size - start):
                target[start + j] += total[j]
