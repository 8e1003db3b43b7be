"""Eight signs at once: a byte of random bits looks up a row of eight signed weights."""

from functools import lru_cache

import numpy as np


_SIGNS_OF_BYTE = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype("f4")


@lru_cache(maxsize=256)
def build_sign_table(weight: float) -> np.ndarray:
    """Return the eight signed weights that the bits of each byte stand for, float32 `[256, 8]`.

    >>> build_sign_table(2.0)[0b00000110].tolist()
    [2.0, -2.0, -2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    return _SIGNS_OF_BYTE * np.float32(weight)


def as_bytes(words: np.ndarray) -> np.ndarray:
    """Return the bytes of `words`, the low one first on any machine.

    >>> as_bytes(np.array([1], dtype=np.uint64)).tolist()
    [1, 0, 0, 0, 0, 0, 0, 0]
    """
    return words.astype("<u8", copy=False).view(np.uint8)
