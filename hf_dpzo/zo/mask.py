"""A mask says which coordinates of the parameters may move."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from hf_dpzo.zo.philox import CHUNK_SIZE


class Mask:
    """The coordinates of the parameters that may move, as one bit for each coordinate.

    Args:
        selected: a boolean array for each parameter, in order: true where a coordinate may move.

    >>> mask = Mask([np.array([True, False, True])])
    >>> mask.count, mask.unpack_chunk(0, 0).tolist(), mask.coordinates(0, limit=1).tolist()
    (2, [1.0, 0.0, 1.0], [0])
    """

    def __init__(self, selected: Sequence[np.ndarray]) -> None:
        self._sizes = tuple(array.size for array in selected)
        self._bits = [np.packbits(array.reshape(-1), bitorder="little") for array in selected]
        self.count = int(sum(np.count_nonzero(array) for array in selected))
        # Never 0, because 0 stands for no mask.
        self.fingerprint = int.from_bytes(hashlib.sha256(b"".join(self._bits)).digest()[:8], "little") | 1

    def unpack_chunk(self, index: int, number: int) -> np.ndarray:
        """Return ones and zeros for one chunk of the `index`-th parameter, float32."""
        size = min(CHUNK_SIZE, self._sizes[index] - number * CHUNK_SIZE)
        bits = self._bits[index][number * CHUNK_SIZE // 8 :][: math.ceil(size / 8)]
        return np.unpackbits(bits, count=size, bitorder="little").astype(np.float32)

    def coordinates(self, index: int, *, limit: int) -> torch.Tensor:
        """Return the numbers of the first `limit` coordinates of the `index`-th parameter that may move."""
        bits = np.unpackbits(self._bits[index], count=self._sizes[index], bitorder="little")
        return torch.from_numpy(np.flatnonzero(bits)[:limit])
