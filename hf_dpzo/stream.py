"""Philox at any place of a run's public directions, chunk by chunk, on as many threads as torch uses."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch


# Coordinates a chunk. Two float32 buffers of it (512 KiB) fit a second-level cache. Part of the format: the Gaussian
# directions are drawn chunk by chunk.
CHUNK = 1 << 16
# How many chunks a thread does at least: fewer take less time than handing them over.
CHUNKS_WORTH_A_THREAD = 4
# What a chunk of a direction is drawn for: chunk, parameter, direction, step; and what all chunks of a sum share.
Address = tuple[int, int, int, int]
Place = tuple[int, int]
# Keys the streams of this library apart from anybody else's use of Philox with the same seed.
_DOMAIN = int.from_bytes(b"hf_dpzo", "big")


class Stream:
    """The counter-based generator of a run, at any place of it. For one thread at a time."""

    def __init__(self, seed: int) -> None:
        # Made once: making one asks the operating system for entropy, which a given key leaves unused.
        self._generator = np.random.Philox(key=np.array([seed, _DOMAIN], dtype=np.uint64))
        self._fresh = self._generator.state

    def at(self, address: Address) -> np.random.Philox:
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
    def first(self) -> Stream:
        """The one of the calling thread."""
        return self._streams[0]

    def share(self, work: Callable[[Stream, range], None], chunks: range) -> None:
        """Have each thread do its share of the chunks, with a stream of its own."""
        threads = max(1, min(torch.get_num_threads(), len(chunks) // CHUNKS_WORTH_A_THREAD))
        if threads == 1:
            work(self.first, chunks)
            return
        while len(self._streams) < threads:
            self._streams.append(Stream(self._seed))
        bounds = [len(chunks) * thread // threads for thread in range(threads + 1)]
        shares = [chunks[first:last] for first, last in itertools.pairwise(bounds)]
        for _ in _pool(torch.get_num_threads()).map(work, self._streams, shares):
            pass  # An error of a thread is raised here.


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hf_dpzo")
