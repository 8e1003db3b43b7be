"""Philox at any place of a run's public directions, chunk by chunk, on as many threads as torch uses."""

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch


# Coordinates a chunk. Two float32 buffers of it (512 KiB) fit a second-level cache. Part of the format: the Gaussian
# directions are drawn chunk by chunk.
CHUNK_SIZE = 1 << 16


# How many chunks a thread does at least: fewer take less time than handing them over.
MIN_CHUNKS_PER_THREAD = 4


# What a chunk of a direction is drawn for: chunk, parameter, direction, step; and what all chunks of a sum share.
ChunkAddress = tuple[int, int, int, int]


SweepAddress = tuple[int, int]


# A step, and one of its directions.
DirectionLabel = tuple[int, int]


# Keys the streams of this library apart from anybody else's use of Philox with the same seed.
_DOMAIN = int.from_bytes(b"hf_dpzo", "big")


class Stream:
    """The counter-based generator of a run, at any place of it. For one thread at a time."""

    def __init__(self, seed: int) -> None:
        # Made once: making one asks the operating system for entropy, which a given key leaves unused.
        self._generator = np.random.Philox(key=np.array([seed, _DOMAIN], dtype=np.uint64))
        self._fresh = self._generator.state

    def seek(self, address: ChunkAddress) -> np.random.Philox:
        """The generator at a chunk's place: each chunk owns 2**32 counts, far more than it uses."""
        chunk, index, direction, step = address
        self._fresh["state"]["counter"] = np.array([chunk << 32, index, direction, step], dtype=np.uint64)
        self._generator.state = self._fresh
        return self._generator


class Streams:
    """The streams of one seed, one for each thread."""

    def __init__(self, seed: int) -> None:
        self._seed, self._streams = seed, [Stream(seed)]

    @property
    def main(self) -> Stream:
        """One for work that is not shared out."""
        return self._streams[0]

    def run_in_threads(self, work: Callable[[Stream, range], None], chunks: range) -> None:
        """Have each thread do its share of the chunks, with a stream of its own."""
        threads = max(1, min(torch.get_num_threads(), len(chunks) // MIN_CHUNKS_PER_THREAD))
        if threads == 1:
            work(self.main, chunks)
            return
        while len(self._streams) < threads:
            self._streams.append(Stream(self._seed))
        bounds = [len(chunks) * thread // threads for thread in range(threads + 1)]
        shares = [chunks[first:last] for first, last in itertools.pairwise(bounds)]
        pool = _get_thread_pool(torch.get_num_threads())
        running = [pool.submit(work, stream, share) for stream, share in zip(self._streams, shares, strict=False)]
        try:
            for one in running:
                one.result()
        finally:
            wait(running)  # Whatever comes next over the same memory must not meet a thread that is late.


class SignWords:
    """The random words of signs, 64 in each. Those of the last direction of a sweep are kept for the next sweep.

    With central differences along one direction, a step sweeps three times: to one probe point, to the other, and for
    the update. What is kept is one bit a coordinate, a thirty-second of the parameters.

    Args:
        sizes: number of coordinates of each parameter.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._kept: dict[int, np.ndarray] = {}
        # Of which step and direction the words are that are kept of a parameter.
        self._labels: dict[int, DirectionLabel] = {}
        # Those that this sweep began with, and whether it asked for any.
        self._label: DirectionLabel | None = None
        self._asked = False

    @contextmanager
    def sweep(self, index: int, step: int, directions: Iterable[int]) -> Iterator[None]:
        """A sweep over all of the `index`-th parameter. One that ends in an error leaves nothing to rely on."""
        if index not in self._kept:
            self._kept[index] = np.empty(math.ceil(self._sizes[index] / 64), dtype=np.uint64)
        self._label, self._asked = self._labels.pop(index, None), False
        yield
        if self._asked:
            self._labels[index] = (step, list(directions)[-1])

    def draw_chunk(self, chunk: int, sweep: SweepAddress, directions: Collection[int], stream: Stream) -> np.ndarray:
        """Return the words of a chunk, uint64 `[directions, words]`, within a sweep."""
        self._asked = True
        index, step = sweep
        kept = self._kept[index][chunk * CHUNK_SIZE // 64 : (chunk + 1) * CHUNK_SIZE // 64]
        found = [self._one((chunk, index, direction, step), kept, stream) for direction in directions]
        rows = np.stack(found) if len(found) > 1 else found[0][None]
        if found[-1] is not kept:
            kept[:] = found[-1]
        return rows

    def _one(self, address: ChunkAddress, kept: np.ndarray, stream: Stream) -> np.ndarray:
        _, _, direction, step = address
        return kept if (step, direction) == self._label else stream.seek(address).random_raw(len(kept))


@lru_cache(maxsize=1)
def _get_thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hf_dpzo")


# A process that is forked off has none of the pool's threads.
os.register_at_fork(after_in_child=_get_thread_pool.cache_clear)
