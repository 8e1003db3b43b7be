"""Random access to the Philox streams behind a run's public directions, chunk by chunk and in several threads."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from hf_dpzo.distributed.threads import divide, run_together


# The number of coordinates in a chunk. Two float32 buffers of a chunk (512 KiB) fit a second-level cache. The number is
# part of the log's format, because Gaussian directions are drawn chunk by chunk.
CHUNK_SIZE = 1 << 16


# With fewer chunks than this for each thread, handing them over takes longer than the work.
MIN_CHUNKS_PER_THREAD = 4


# The numbers of a chunk, its parameter, the direction and the step.
ChunkAddress = tuple[int, int, int, int]


# The numbers of a parameter and a step, which all chunks of a sweep share.
SweepAddress = tuple[int, int]


# The numbers of a step and one of its directions.
DirectionLabel = tuple[int, int]


# Half of the Philox key, so that other code which uses Philox with the same seed draws other numbers.
DOMAIN = int.from_bytes(b"hf_dpzo", "big")


class Stream:
    """A run's counter-based generator, which can seek any chunk. Not for several threads at once.

    Args:
        seed: the run's public seed.
    """

    def __init__(self, seed: int) -> None:
        # Created only once: NumPy asks the operating system for entropy each time, even though the key replaces it.
        self._generator = np.random.Philox(key=np.array([seed, DOMAIN], dtype=np.uint64))
        self._fresh = self._generator.state

    def seek(self, address: ChunkAddress) -> np.random.Philox:
        """Return the generator, set to the start of a chunk. Each chunk owns 2**32 counts, far more than it uses."""
        chunk, index, direction, step = address
        self._fresh["state"]["counter"] = np.array([chunk << 32, index, direction, step], dtype=np.uint64)
        self._generator.state = self._fresh
        return self._generator


class Streams:
    """The streams of one seed, one for each thread.

    Args:
        seed: the run's public seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._streams = [Stream(seed)]

    @property
    def main(self) -> Stream:
        """The stream for work that is not divided among threads."""
        return self._streams[0]

    def run_in_threads(self, work: Callable[[Stream, range], None], chunks: range) -> None:
        """Divide `chunks` among as many threads as torch uses, and wait for them.

        Args:
            work: does a consecutive share of the chunks, with a stream of its own.
            chunks: the numbers of the chunks.
        """
        shares = divide(chunks, least=MIN_CHUNKS_PER_THREAD)
        while len(self._streams) < len(shares):
            self._streams.append(Stream(self._seed))
        pairs = zip(self._streams, shares, strict=False)
        run_together([functools.partial(work, stream, share) for stream, share in pairs])


class SignWords:
    """Draws random words of 64 signs each, and keeps those of a sweep's last direction for the next sweep.

    With central differences along one direction, a step sweeps three times: to one probe point, to the other, and for
    the update. It draws only once. The words take one bit for each coordinate, 1/32 of the size of float32 parameters.

    Args:
        sizes: the number of coordinates of each parameter, in order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        # For each parameter the words that are kept, and the step and direction that they belong to.
        self._kept_words: dict[int, np.ndarray] = {}
        self._kept_labels: dict[int, DirectionLabel] = {}
        # The label of the words that were kept when the current sweep began, and whether it has drawn any chunk.
        self._label: DirectionLabel | None = None
        self._has_drawn = False

    @contextmanager
    def sweep(self, index: int, step: int, directions: Iterable[int]) -> Iterator[None]:
        """Open a sweep over all of the `index`-th parameter. After one that ends in an error, words are drawn again."""
        if index not in self._kept_words:
            self._kept_words[index] = np.empty(math.ceil(self._sizes[index] / 64), dtype=np.uint64)
        self._label = self._kept_labels.pop(index, None)
        self._has_drawn = False
        yield
        if self._has_drawn:
            self._kept_labels[index] = (step, list(directions)[-1])

    def draw_rows(
        self, chunk: int, sweep: SweepAddress, directions: Iterable[int], stream: Stream
    ) -> Iterator[np.ndarray]:
        """Yield the words of a chunk, uint64 `[words]`, direction by direction, and keep the last after all are taken.

        They take no more memory than one direction's, however many directions there are. Each is to be used before the
        next one is drawn. To be called within a sweep.
        """
        self._has_drawn = True
        index, step = sweep
        kept = self._kept_words[index][chunk * CHUNK_SIZE // 64 : (chunk + 1) * CHUNK_SIZE // 64]
        row = kept
        for direction in directions:
            row = self._draw_row((chunk, index, direction, step), kept, stream)
            yield row
        if row is not kept:
            kept[:] = row

    def _draw_row(self, address: ChunkAddress, kept: np.ndarray, stream: Stream) -> np.ndarray:
        _, _, direction, step = address
        return kept if (step, direction) == self._label else stream.seek(address).random_raw(len(kept))
