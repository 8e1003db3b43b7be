"""Public random directions, added to parameters in place.

A direction z is a function of (run seed, step, direction number, parameter number, coordinate) and of nothing else. It
need not be stored: any slice of it can be drawn again at any time, and everyone who knows the seed can replay it. It is
public, so it must never be counted on to hide the data.

The work is done in chunks that fit a core's cache, so no temporary tensor is as large as a parameter.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from hf_dpzo.distributed.checksums import MIN_NUMBERS_TO_COMPILE as MIN_COORDINATES_TO_COMPILE
from hf_dpzo.distributed.sharding import get_local_shard
from hf_dpzo.zo.device_signs import Part, add_on_device
from hf_dpzo.zo.kernel import Kernel, add_rows, compile_kernel
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.philox import CHUNK_SIZE, ChunkAddress, SignWords, Stream, Streams, SweepAddress
from hf_dpzo.zo.sign_table import as_bytes, build_sign_table
from hf_dpzo.zo.squares import sum_of_squares
from hf_dpzo.zo.swept import SweptChecksums


# The number of chunks sent to another device in one copy: enough to make copies rare, few enough to use little memory.
CHUNKS_PER_BLOCK = 64


class Directions(ABC):
    """The directions z of a run, one for each pair of a step and a direction number.

    Args:
        seed: the run's public seed.
        sizes: the number of coordinates of each parameter, in order.
        mask: the coordinates at which directions are not zero; by default all.
        scales: the factor on each parameter's part of every direction, in order; by default one for all.
    """

    def __init__(
        self, *, seed: int, sizes: Sequence[int], mask: Mask | None = None, scales: Sequence[float] | None = None
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: the public seed of the directions is an integer from 0 to 2**64 - 1.")
        self.seed = seed
        self.sizes = tuple(sizes)
        self.mask = mask
        self.scales = (1.0,) * len(self.sizes) if scales is None else tuple(scales)
        # The checksums of what sweeps have left, where they took them.
        self.swept = SweptChecksums()
        self._streams = Streams(seed)

    @property
    def dimension(self) -> int:
        """The number of coordinates at which directions are not zero."""
        return sum(self.sizes) if self.mask is None else self.mask.count

    @torch.no_grad()
    def add_(self, parameter: torch.Tensor, *, index: int, step: int, weights: Mapping[int, float]) -> None:
        """Add `sum_k weights[k] * z_k` to `parameter`, the `index`-th one, in place.

        Of a sharded parameter, only this process' shard is changed. Each coordinate is rounded once, after the sum over
        k has been taken in float32. On a CPU the work uses as many threads as torch does; their number changes no bit.

        Args:
            parameter: the parameter, of any shape and floating-point type.
            index: the parameter's number in `sizes`.
            step: the step, from 0.
            weights: the weight of each direction, by its number.
        """
        weights = self._scale(index, weights)
        shard, start = get_local_shard(parameter)
        flat = shard.detach().view(-1)
        if flat.numel() < self.sizes[index]:
            self._add_to_shard(flat, start, (index, step), weights)
            return
        chunks = range(math.ceil(flat.numel() / CHUNK_SIZE))
        if flat.device.type == "cpu":
            # On a CPU NumPy adds in place a third faster than torch does, with the same rounding.
            self._streams.run_in_threads(
                functools.partial(self._add_chunks, flat.numpy(), (index, step), weights), chunks
            )
            return
        for block in (chunks[first : first + CHUNKS_PER_BLOCK] for first in chunks[::CHUNKS_PER_BLOCK]):
            piece = flat[block.start * CHUNK_SIZE : block.stop * CHUNK_SIZE]
            piece.add_(self._combine_on_device(piece.device, block, (index, step), weights))

    def add_all_(
        self, parameters: Sequence[torch.Tensor], *, step: int, weights: Sequence[Mapping[int, float]]
    ) -> None:
        """Add to each of `parameters`, in the order of `sizes`, with its own `weights`, as `add_` does."""
        for index, (parameter, own) in enumerate(zip(parameters, weights, strict=True)):
            self.add_(parameter, index=index, step=step, weights=own)

    def values(
        self, *, index: int, step: int, direction: int, start: int = 0, stop: int | None = None, weight: float = 1.0
    ) -> torch.Tensor:
        """Return `weight` times the coordinates from `start` up to `stop` of one direction, float32 `[stop - start]`.

        They have the bits that `add_` adds.

        >>> z = Rademacher(seed=0, sizes=[8]).values(index=0, step=0, direction=0)
        >>> z.tolist() == Rademacher(seed=0, sizes=[8]).values(index=0, step=0, direction=0).tolist(), z.abs().tolist()
        (True, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        """
        stop = self.sizes[index] if stop is None else stop
        chunks = range(start // CHUNK_SIZE, math.ceil(stop / CHUNK_SIZE))
        weights = self._scale(index, {direction: weight})
        whole = torch.from_numpy(self._combine_chunks(chunks, (index, step), weights))
        offset = (start // CHUNK_SIZE) * CHUNK_SIZE
        return whole[start - offset : stop - offset]

    def _scale(self, index: int, weights: Mapping[int, float]) -> Mapping[int, float]:
        """Return `weights` times the scale of the `index`-th parameter."""
        scale = self.scales[index]
        return weights if scale == 1 else {direction: weight * scale for direction, weight in weights.items()}

    def _add_to_shard(self, shard: torch.Tensor, start: int, sweep: SweepAddress, weights: Mapping[int, float]) -> None:
        """Add to the coordinates of a shard, the first of which is number `start`."""
        stop = start + len(shard)
        for chunk in range(start // CHUNK_SIZE, math.ceil(stop / CHUNK_SIZE)):
            first, last = max(start, chunk * CHUNK_SIZE), min(stop, (chunk + 1) * CHUNK_SIZE)
            combined = self._combine_chunk(chunk, sweep, weights, self._streams.main)
            overlap = torch.from_numpy(combined[first - chunk * CHUNK_SIZE : last - chunk * CHUNK_SIZE])
            shard[first - start : last - start].add_(overlap.to(shard.device))

    def _add_chunks(
        self, target: np.ndarray, sweep: SweepAddress, weights: Mapping[int, float], stream: Stream, chunks: range
    ) -> None:
        for chunk in chunks:
            piece = target[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
            piece += self._combine_chunk(chunk, sweep, weights, stream)

    def _combine_on_device(
        self, device: torch.device, chunks: range, sweep: SweepAddress, weights: Mapping[int, float]
    ) -> torch.Tensor:
        """Return `sum_k weights[k] * z_k` on consecutive chunks, float32, on a `device` other than the CPU."""
        return torch.from_numpy(self._combine_chunks(chunks, sweep, weights)).to(device)

    def _combine_chunks(self, chunks: range, sweep: SweepAddress, weights: Mapping[int, float]) -> np.ndarray:
        pieces = [self._combine_chunk(chunk, sweep, weights, self._streams.main) for chunk in chunks]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)

    def _combine_chunk(
        self, chunk: int, sweep: SweepAddress, weights: Mapping[int, float], stream: Stream
    ) -> np.ndarray:
        index, step = sweep
        size = self._count_coordinates(chunk, index)
        total = None
        for direction, weight in weights.items():
            scaled = self._draw_scaled(weight, size, (chunk, index, direction, step), stream)
            total = scaled if total is None else np.add(total, scaled, out=total)
        if total is None:
            return np.zeros(size, dtype=np.float32)
        return total if self.mask is None else total * self.mask.unpack_chunk(index, chunk)

    def _count_coordinates(self, chunk: int, index: int) -> int:
        return min(CHUNK_SIZE, self.sizes[index] - chunk * CHUNK_SIZE)

    @abstractmethod
    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        """Return `weight * z` on one chunk, a new float32 array `[size]`."""


class Rademacher(Directions):
    """Directions of independent fair signs (Spall 1992): `||z||**2` is exactly the number of coordinates.

    The signs are the bits of Philox's output, in order, so they are the same on every device.
    """

    def __init__(
        self, *, seed: int, sizes: Sequence[int], mask: Mask | None = None, scales: Sequence[float] | None = None
    ) -> None:
        super().__init__(seed=seed, sizes=sizes, mask=mask, scales=scales)
        self._words = SignWords(self.sizes)

    def add_(self, parameter: torch.Tensor, *, index: int, step: int, weights: Mapping[int, float]) -> None:
        """See `Directions.add_`."""
        if self._is_drawn_on_device(parameter, weights):
            scaled = self._scale(index, weights)
            add_on_device([_find_part(parameter, index)], scaled, seed=self.seed, step=step)
            return
        # Both compile before several threads ask for them.
        takes_sums = self._choose_kernel() is not None and bool(weights)
        with self._words.sweep(index, step, weights), self.swept.sweep(parameter, index, takes_sums=takes_sums):
            super().add_(parameter, index=index, step=step, weights=weights)

    def add_all_(
        self, parameters: Sequence[torch.Tensor], *, step: int, weights: Sequence[Mapping[int, float]]
    ) -> None:
        """See `Directions.add_all_`; what is drawn on a device takes one launch for each type and distinct weights."""
        groups: dict[tuple[Any, ...], list[Part]] = {}
        for index, (parameter, own) in enumerate(zip(parameters, weights, strict=True)):
            if self._is_drawn_on_device(parameter, own):
                key = (parameter.device, parameter.dtype, tuple(self._scale(index, own).items()))
                groups.setdefault(key, []).append(_find_part(parameter, index))
            else:
                self.add_(parameter, index=index, step=step, weights=own)
        for (_, _, items), parts in groups.items():
            add_on_device(parts, dict(items), seed=self.seed, step=step)

    def _is_drawn_on_device(self, parameter: torch.Tensor, weights: Mapping[int, float]) -> bool:
        return parameter.device.type != "cpu" and self.mask is None and bool(weights)

    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        words = stream.seek(address).random_raw(math.ceil(size / 64))
        return build_sign_table(weight).take(as_bytes(words), axis=0, mode="clip").reshape(-1)[:size]

    def _add_chunks(
        self, target: np.ndarray, sweep: SweepAddress, weights: Mapping[int, float], stream: Stream, chunks: range
    ) -> None:
        kernel = self._choose_kernel()
        if kernel is None or not weights or target.dtype != np.float32:
            super()._add_chunks(target, sweep, weights, stream, chunks)
            return
        scales = np.array(list(weights.values()), dtype=np.float32)
        for chunk in chunks:
            piece = target[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
            add_rows(piece, self._words.draw_rows(chunk, sweep, weights, stream), scales, kernel)
            self.swept.take(piece, sweep[0], chunk)

    def _choose_kernel(self) -> Kernel | None:
        """Return the compiled kernel if there is one and it pays; otherwise NumPy does the work."""
        return compile_kernel() if self.mask is None and sum(self.sizes) >= MIN_COORDINATES_TO_COMPILE else None

    def _combine_on_device(
        self, device: torch.device, chunks: range, sweep: SweepAddress, weights: Mapping[int, float]
    ) -> torch.Tensor:
        """See `Directions`; here only one bit for each coordinate crosses to the device.

        This is the plain twin of `device_signs`, which draws the same signs there.
        """
        if self.mask is not None or not weights:
            return super()._combine_on_device(device, chunks, sweep, weights)
        # Direction by direction, so that the words of many directions are never there at once.
        rows = zip(*(self._words.draw_rows(chunk, sweep, weights, self._streams.main) for chunk in chunks), strict=True)
        total = None
        for row, weight in zip(rows, weights.values(), strict=True):
            table = torch.from_numpy(build_sign_table(weight)).to(device)
            scaled = table.index_select(0, torch.from_numpy(as_bytes(np.concatenate(row))).to(device).int())
            total = scaled if total is None else total.add_(scaled)
        return total.view(-1)[: self.sizes[sweep[0]] - chunks.start * CHUNK_SIZE]


class Gaussian(Directions):
    """Directions of independent standard normal coordinates, as in MeZO (Malladi et al. 2023).

    NumPy draws each chunk from the chunk's own place in the Philox stream.
    """

    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        normal = np.random.Generator(stream.seek(address)).standard_normal(size, dtype=np.float32)
        return np.multiply(normal, np.float32(weight), out=normal)


class Sphere(Gaussian):
    """Directions uniform on the sphere of radius `sqrt(d)`, over all d coordinates, as in DPZero's theory."""

    def __init__(
        self, *, seed: int, sizes: Sequence[int], mask: Mask | None = None, scales: Sequence[float] | None = None
    ) -> None:
        super().__init__(seed=seed, sizes=sizes, mask=mask, scales=scales)
        self._stretch = lru_cache(maxsize=1 << 16)(self._compute_stretch)  # As many as a step may have directions.

    def add_(self, parameter: torch.Tensor, *, index: int, step: int, weights: Mapping[int, float]) -> None:
        """See `Directions.add_`."""
        for direction in weights:  # Computed once, before several threads ask for it.
            self._stretch(direction, step)
        super().add_(parameter, index=index, step=step, weights=weights)

    def _draw_scaled(self, weight: float, size: int, address: ChunkAddress, stream: Stream) -> np.ndarray:
        _, _, direction, step = address
        return super()._draw_scaled(weight * self._stretch(direction, step), size, address, stream)

    def _compute_stretch(self, direction: int, step: int) -> float:
        """Return the factor that takes a direction's Gaussian vector to the sphere."""
        squares, stream = 0.0, Stream(self.seed)
        for index, numel in enumerate(self.sizes):
            for chunk in range(math.ceil(numel / CHUNK_SIZE)):
                size = self._count_coordinates(chunk, index)
                piece = super()._draw_scaled(1.0, size, (chunk, index, direction, step), stream)
                piece = piece if self.mask is None else piece * self.mask.unpack_chunk(index, chunk)
                squares += sum_of_squares(torch.from_numpy(piece))
        return math.sqrt(self.dimension / squares)


def _find_part(parameter: torch.Tensor, index: int) -> Part:
    """Return what this process holds of a parameter, and where it is."""
    shard, start = get_local_shard(parameter)
    return Part(values=shard.detach().view(-1), index=index, start=start)


DIRECTIONS: dict[str, type[Directions]] = {"rademacher": Rademacher, "gaussian": Gaussian, "sphere": Sphere}
