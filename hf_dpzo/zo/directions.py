"""Public random directions, added to parameters in place.

A direction z is a function of (run seed, step, direction number, parameter number, coordinate) and of nothing else:
it need not be stored, any slice of it can be drawn at any time, and whoever knows the seed can replay it. It says
nothing about the data, and must never be counted on to hide them.

The work is done in chunks that fit a core's cache, so that no tensor of a parameter's size is made.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from hf_dpzo.distributed.sharding import get_local_shard
from hf_dpzo.zo.kernel import Kernel, compile_kernel
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.philox import CHUNK_SIZE, ChunkAddress, SignWords, Stream, Streams, SweepAddress


# How many chunks are sent to another device at once: so few copies that they cost little, and so little memory.
CHUNKS_PER_BLOCK = 64


# For how many coordinates Numba is loaded, which takes a second and 160 MiB: fewer cost a step some milliseconds.
MIN_COORDINATES_TO_COMPILE = 20_000_000


_SIGNS_OF_BYTE = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype("f4")


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
        self._streams = Streams(seed)

    @property
    def dimension(self) -> int:
        """How many coordinates the directions have."""
        return sum(self.sizes) if self.mask is None else self.mask.count

    @torch.no_grad()
    def add_(self, parameter: torch.Tensor, *, index: int, step: int, weights: Mapping[int, float]) -> None:
        """Add `sum_k weights[k] * z_k` to `parameter`, the `index`-th one, in place.

        Of a parameter that is split over processes, the part that is here. Each coordinate is rounded once, after the
        sum over k has been taken in float32. On a CPU as many threads do it
        as torch uses, and how many they are changes no bit.
        """
        part, start = get_local_shard(parameter)
        flat = part.detach().view(-1)
        if flat.numel() < self.sizes[index]:
            self._add_part(flat, start, (index, step), weights)
            return
        chunks = range(math.ceil(flat.numel() / CHUNK_SIZE))
        if flat.device.type == "cpu":
            # NumPy adds in place a third faster than torch does on a CPU, and rounds the same.
            self._streams.run_in_threads(
                functools.partial(self._add_chunks, flat.numpy(), (index, step), weights), chunks
            )
            return
        for block in (chunks[first : first + CHUNKS_PER_BLOCK] for first in chunks[::CHUNKS_PER_BLOCK]):
            piece = flat[block.start * CHUNK_SIZE : block.stop * CHUNK_SIZE]
            piece.add_(self._combine_on_device(piece.device, block, (index, step), weights))

    def values(self, *, index: int, step: int, direction: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return coordinates `start` to `stop` of one direction, float32.

        >>> z = Rademacher(seed=0, sizes=[8]).values(index=0, step=0, direction=0)
        >>> z.tolist() == Rademacher(seed=0, sizes=[8]).values(index=0, step=0, direction=0).tolist(), z.abs().tolist()
        (True, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        """
        stop = self.sizes[index] if stop is None else stop
        chunks = range(start // CHUNK_SIZE, math.ceil(stop / CHUNK_SIZE))
        whole = torch.from_numpy(self._combine_chunks(chunks, (index, step), {direction: 1.0}))
        offset = (start // CHUNK_SIZE) * CHUNK_SIZE
        return whole[start - offset : stop - offset]

    def _add_part(self, part: torch.Tensor, start: int, sweep: SweepAddress, weights: Mapping[int, float]) -> None:
        """Add to consecutive coordinates, the first of which is number `start`."""
        stop = start + len(part)
        for chunk in range(start // CHUNK_SIZE, math.ceil(stop / CHUNK_SIZE)):
            first, last = max(start, chunk * CHUNK_SIZE), min(stop, (chunk + 1) * CHUNK_SIZE)
            added = self._combine_chunk(chunk, sweep, weights, self._streams.main)
            added = torch.from_numpy(added[first - chunk * CHUNK_SIZE : last - chunk * CHUNK_SIZE])
            part[first - start : last - start].add_(added.to(part.device))

    def _add_chunks(
        self, target: np.ndarray, sweep: SweepAddress, weights: Mapping[int, float], stream: Stream, chunks: range
    ) -> None:
        for chunk in chunks:
            piece = target[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
            piece += self._combine_chunk(chunk, sweep, weights, stream)

    def _combine_on_device(
        self, device: torch.device, chunks: range, sweep: SweepAddress, weights: Mapping[int, float]
    ) -> torch.Tensor:
        """`sum_k weights[k] * z_k` on consecutive chunks, float32, where a parameter is that is not on a CPU."""
        return torch.from_numpy(self._combine_chunks(chunks, sweep, weights)).to(device)

    def _combine_chunks(self, chunks: range, sweep: SweepAddress, weights: Mapping[int, float]) -> np.ndarray:
        pieces = [self._combine_chunk(chunk, sweep, weights, self._streams.main) for chunk in chunks]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)

    def _combine_chunk(
        self, chunk: int, sweep: SweepAddress, weights: Mapping[int, float], stream: Stream
    ) -> np.ndarray:
        index, step = sweep
        size = self._size(chunk, index)
        total = None
        for direction, weight in weights.items():
            scaled = self._draw_scaled(weight, size, (chunk, index, direction, step), stream)
            total = scaled if total is None else np.add(total, scaled, out=total)
        if total is None:
            return np.zeros(size, dtype=np.float32)
        return total if self.mask is None else total * self.mask.unpack_chunk(index, chunk)

    def _size(self, chunk: int, index: int) -> int:
        return min(CHUNK_SIZE, self.sizes[index] - chunk * CHUNK_SIZE)

    @abstractmethod
    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        """Return `weight * z` on one chunk, a new float32 array `[size]`."""


class Rademacher(Directions):
    """Independent fair signs (Spall 1992): `||z||**2` is exactly the number of coordinates.

    The signs are the bits of Philox's output, in order, so they are the same on every device.
    """

    def __init__(self, *, seed: int, sizes: Sequence[int], mask: Mask | None = None) -> None:
        super().__init__(seed=seed, sizes=sizes, mask=mask)
        self._words = SignWords(self.sizes)

    def add_(self, parameter: torch.Tensor, *, index: int, step: int, weights: Mapping[int, float]) -> None:
        """As in `Directions`."""
        self._kernel()  # Compiled before several threads ask for it.
        with self._words.sweep(index, step, weights):
            super().add_(parameter, index=index, step=step, weights=weights)

    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        words = stream.seek(address).random_raw(math.ceil(size / 64))
        # Eight signs at once: a byte of random bits looks up a row of eight signed weights.
        return _signed_weights(weight).take(_bytes(words), axis=0, mode="clip").reshape(-1)[:size]

    def _add_chunks(
        self, target: np.ndarray, sweep: SweepAddress, weights: Mapping[int, float], stream: Stream, chunks: range
    ) -> None:
        kernel = self._kernel()
        if kernel is None or not weights or target.dtype != np.float32:
            super()._add_chunks(target, sweep, weights, stream, chunks)
            return
        scales = np.array(list(weights.values()), dtype=np.float32)
        for chunk in chunks:
            piece = target[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
            kernel(piece, self._words.draw_chunk(chunk, sweep, weights, stream), scales)

    def _kernel(self) -> Kernel | None:
        """The compiled way to add, where it pays and there is one."""
        return compile_kernel() if self.mask is None and sum(self.sizes) >= MIN_COORDINATES_TO_COMPILE else None

    def _combine_on_device(
        self, device: torch.device, chunks: range, sweep: SweepAddress, weights: Mapping[int, float]
    ) -> torch.Tensor:
        """As in `Directions`, but what crosses to the device is one bit a coordinate."""
        if self.mask is not None or not weights:
            return super()._combine_on_device(device, chunks, sweep, weights)
        words = [self._words.draw_chunk(chunk, sweep, weights, self._streams.main) for chunk in chunks]
        total = None
        for row, weight in zip(np.concatenate(words, axis=1), weights.values(), strict=True):
            table = torch.from_numpy(_signed_weights(weight)).to(device)
            scaled = table.index_select(0, torch.from_numpy(_bytes(row)).to(device).int())
            total = scaled if total is None else total.add_(scaled)
        return total.view(-1)[: self.sizes[sweep[0]] - chunks.start * CHUNK_SIZE]


class Gaussian(Directions):
    """Independent standard normal coordinates, as in MeZO (Malladi et al. 2023).

    Each chunk is drawn by NumPy from the chunk's own Philox stream.
    """

    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        normal = np.random.Generator(stream.seek(address)).standard_normal(size, dtype=np.float32)
        return np.multiply(normal, np.float32(weight), out=normal)


class Sphere(Gaussian):
    """Uniform on the sphere of radius `sqrt(d)` over all d coordinates of all parameters, as in DPZero's theory."""

    def __init__(self, *, seed: int, sizes: Sequence[int], mask: Mask | None = None) -> None:
        super().__init__(seed=seed, sizes=sizes, mask=mask)
        self._stretch = lru_cache(maxsize=256)(self._compute_stretch)

    def add_(self, parameter: torch.Tensor, *, index: int, step: int, weights: Mapping[int, float]) -> None:
        """As in `Directions`."""
        for direction in weights:  # Once, before several threads ask for it.
            self._stretch(direction, step)
        super().add_(parameter, index=index, step=step, weights=weights)

    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        _, _, direction, step = address
        return super()._draw_scaled(weight * self._stretch(direction, step), size, address, stream)

    def _compute_stretch(self, direction: int, step: int) -> float:
        """What takes the Gaussian vector of a direction to the sphere."""
        squares, stream = 0.0, Stream(self.seed)
        for index, numel in enumerate(self.sizes):
            for chunk in range(math.ceil(numel / CHUNK_SIZE)):
                piece = super()._draw_scaled(1.0, self._size(chunk, index), (chunk, index, direction, step), stream)
                piece = piece if self.mask is None else piece * self.mask.unpack_chunk(index, chunk)
                squares += sum_of_squares(torch.from_numpy(piece))
        return math.sqrt(self.dimension / squares)


@lru_cache(maxsize=256)
def _signed_weights(weight: float) -> np.ndarray:
    """For each byte the eight signed weights that its bits stand for, `[256, 8]`."""
    return _SIGNS_OF_BYTE * np.float32(weight)


def _bytes(words: np.ndarray) -> np.ndarray:
    """The bytes of words, the low one first on any machine."""
    return words.astype("<u8", copy=False).view(np.uint8)


def sum_of_squares(values: torch.Tensor) -> float:
    """The sum of squares in float64, added up by NumPy, whose order no number of threads changes. So a replay agrees.

    >>> sum_of_squares(torch.tensor([3.0, 4.0]))
    25.0
    """
    return float(np.square(values.numpy().astype(np.float64)).sum())


DIRECTIONS: dict[str, type[Directions]] = {"rademacher": Rademacher, "gaussian": Gaussian, "sphere": Sphere}
