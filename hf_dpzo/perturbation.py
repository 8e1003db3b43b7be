"""Public random directions, added to parameters in place.

A direction z is a function of (run seed, step, direction number, parameter number, coordinate) and of nothing else:
it is never stored, any slice of it can be drawn at any time, and whoever knows the seed can replay it. It says
nothing about the data, and must never be counted on to hide them.

The work is done in chunks that fit a core's cache, so that no tensor of a parameter's size is made.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch


# Coordinates a chunk. Two float32 buffers of it (512 KiB) fit a second-level cache. Part of the format: the Gaussian
# directions are drawn chunk by chunk.
CHUNK = 1 << 16
# Keys the streams of this library apart from anybody else's use of Philox with the same seed.
_DOMAIN = int.from_bytes(b"hf_dpzo", "big")
_SIGNS_OF_BYTE = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype("f4")


class Mask:
    """Which coordinates of the parameters may move; one bit for each.

    Args:
        selected: booleans for each parameter, in order.

    >>> mask = Mask([np.array([True, False, True])])
    >>> mask.count, mask.chunk(0, 0).tolist(), mask.coordinates(0, limit=1).tolist()
    (2, [1.0, 0.0, 1.0], [0])
    """

    def __init__(self, selected: Sequence[np.ndarray]) -> None:
        self._sizes = tuple(one.size for one in selected)
        self._bits = [np.packbits(one.reshape(-1), bitorder="little") for one in selected]
        self.count = int(sum(np.count_nonzero(one) for one in selected))
        # Other than 0, which stands for no mask.
        self.fingerprint = int.from_bytes(hashlib.sha256(b"".join(self._bits)).digest()[:8], "little") | 1

    def chunk(self, index: int, number: int) -> np.ndarray:
        """Return ones and zeros for one chunk of the `index`-th parameter, float32."""
        size = min(CHUNK, self._sizes[index] - number * CHUNK)
        bits = self._bits[index][number * CHUNK // 8 :][: math.ceil(size / 8)]
        return np.unpackbits(bits, count=size, bitorder="little").astype(np.float32)

    def coordinates(self, index: int, *, limit: int) -> torch.Tensor:
        """Return the numbers of the first `limit` coordinates of the `index`-th parameter that may move."""
        bits = np.unpackbits(self._bits[index], count=self._sizes[index], bitorder="little")
        return torch.from_numpy(np.flatnonzero(bits)[:limit])


class Directions(ABC):
    """The directions z of a run, one for each (step, direction) pair.

    Args:
        seed: the run's public seed.
        sizes: number of coordinates of each parameter, in order.
        mask: the coordinates that the directions have; the others are zero. By default all.
    """

    def __init__(self, *, seed: int, sizes: Sequence[int], mask: Mask | None = None) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: the public seed of the directions is an integer from 0 to 2**64 - 1.")
        self.seed = seed
        self.sizes = tuple(sizes)
        self.mask = mask
        # Made once: making one asks the operating system for entropy, which a given key leaves unused.
        self._generator = np.random.Philox(key=np.array([seed, _DOMAIN], dtype=np.uint64))
        self._fresh = self._generator.state

    @property
    def dimension(self) -> int:
        """How many coordinates the directions have."""
        return sum(self.sizes) if self.mask is None else self.mask.count

    @torch.no_grad()
    def add_(self, parameter: torch.Tensor, *, index: int, step: int, weights: Mapping[int, float]) -> None:
        """Add `sum_k weights[k] * z_k` to `parameter`, the `index`-th one, in place.

        Each coordinate is rounded once, after the sum over k has been taken in float32.
        """
        flat = parameter.detach().view(-1)
        # NumPy adds in place a third faster than torch does on a CPU, and rounds the same.
        target = flat.numpy() if flat.device.type == "cpu" else None
        for chunk, start in enumerate(range(0, flat.numel(), CHUNK)):
            added = self._combination(chunk, index=index, step=step, weights=weights)
            if target is None:
                flat[start : start + CHUNK].add_(torch.from_numpy(added).to(flat.device))
            else:
                target[start : start + CHUNK] += added

    def values(self, *, index: int, step: int, direction: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return coordinates `start` to `stop` of one direction, float32.

        >>> z = Rademacher(seed=0, sizes=[8]).values(index=0, step=0, direction=0)
        >>> z.tolist() == Rademacher(seed=0, sizes=[8]).values(index=0, step=0, direction=0).tolist(), z.abs().tolist()
        (True, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        """
        stop = self.sizes[index] if stop is None else stop
        chunks = range(start // CHUNK, math.ceil(stop / CHUNK))
        pieces = [self._combination(c, index=index, step=step, weights={direction: 1.0}) for c in chunks]
        whole = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0)
        offset = (start // CHUNK) * CHUNK
        return whole[start - offset : stop - offset]

    def _combination(self, chunk: int, *, index: int, step: int, weights: Mapping[int, float]) -> np.ndarray:
        size = min(CHUNK, self.sizes[index] - chunk * CHUNK)
        total = None
        for direction, weight in weights.items():
            scaled = self._scaled(weight, size=size, address=(chunk, index, direction, step))
            total = scaled if total is None else np.add(total, scaled, out=total)
        if total is None:
            return np.zeros(size, dtype=np.float32)
        return total if self.mask is None else total * self.mask.chunk(index, chunk)

    @abstractmethod
    def _scaled(self, weight: float, *, size: int, address: tuple[int, int, int, int]) -> np.ndarray:
        """Return `weight * z` on one chunk, a new float32 array `[size]`."""

    def _philox(self, address: tuple[int, int, int, int]) -> np.random.Philox:
        """The counter-based generator at a chunk's place: each chunk owns 2**32 counts, far more than it uses."""
        chunk, index, direction, step = address
        self._fresh["state"]["counter"] = np.array([chunk << 32, index, direction, step], dtype=np.uint64)
        self._generator.state = self._fresh
        return self._generator


class Rademacher(Directions):
    """Independent fair signs (Spall 1992): `||z||**2` is exactly the number of coordinates.

    The signs are the bits of Philox's output, in order, so they are the same on every device.
    """

    def _scaled(self, weight: float, *, size: int, address: tuple[int, int, int, int]) -> torch.Tensor:
        words = self._philox(address).random_raw(math.ceil(size / 64)).astype("<u8", copy=False)
        # Eight signs at once: a byte of random bits looks up a row of eight signed weights.
        return _signed_weights(weight).take(words.view(np.uint8), axis=0, mode="clip").reshape(-1)[:size]


class Gaussian(Directions):
    """Independent standard normal coordinates, as in MeZO (Malladi et al. 2023).

    Each chunk is drawn by NumPy from the chunk's own Philox stream.
    """

    def _scaled(self, weight: float, *, size: int, address: tuple[int, int, int, int]) -> torch.Tensor:
        normal = np.random.Generator(self._philox(address)).standard_normal(size, dtype=np.float32)
        return np.multiply(normal, np.float32(weight), out=normal)


class Sphere(Gaussian):
    """Uniform on the sphere of radius `sqrt(d)` over all d coordinates of all parameters, as in DPZero's theory."""

    def __init__(self, *, seed: int, sizes: Sequence[int], mask: Mask | None = None) -> None:
        super().__init__(seed=seed, sizes=sizes, mask=mask)
        self._stretch = lru_cache(maxsize=256)(self._compute_stretch)

    def _scaled(self, weight: float, *, size: int, address: tuple[int, int, int, int]) -> torch.Tensor:
        _, _, direction, step = address
        return super()._scaled(weight * self._stretch(direction, step), size=size, address=address)

    def _compute_stretch(self, direction: int, step: int) -> float:
        """What takes the Gaussian vector of a direction to the sphere."""
        squares = 0.0
        for index, numel in enumerate(self.sizes):
            for chunk in range(math.ceil(numel / CHUNK)):
                size = min(CHUNK, numel - chunk * CHUNK)
                piece = super()._scaled(1.0, size=size, address=(chunk, index, direction, step))
                piece = piece if self.mask is None else piece * self.mask.chunk(index, chunk)
                squares += sum_of_squares(torch.from_numpy(piece))
        return math.sqrt(self.dimension / squares)


@lru_cache(maxsize=256)
def _signed_weights(weight: float) -> np.ndarray:
    """For each byte the eight signed weights that its bits stand for, `[256, 8]`."""
    return _SIGNS_OF_BYTE * np.float32(weight)


def sum_of_squares(values: torch.Tensor) -> float:
    """The sum of squares in float64, added up by NumPy, whose order no number of threads changes. So a replay agrees.

    >>> sum_of_squares(torch.tensor([3.0, 4.0]))
    25.0
    """
    return float(np.square(values.numpy().astype(np.float64)).sum())


DIRECTIONS: dict[str, type[Directions]] = {"rademacher": Rademacher, "gaussian": Gaussian, "sphere": Sphere}
