"""Memory, or a file without a name, for what is kept of rows from step to step. As private as the rows are."""

import math
import mmap
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch


# Entries begin at multiples of so many bytes, so that tensors of any type can be read in place.
ALIGNMENT = 64


# So many bytes of a file are claimed at once.
CLAIMED_BYTES = 1 << 24


# At most this share of the memory, or of the disk, that is free is taken.
FREE_SHARE = 0.5


# Where rows may be kept, and the types of their numbers: `None` for that of the model.
CACHE_PLACES = ("none", "memory", "disk")
CACHE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FrozenCache:
    """The settings of what is kept of rows from step to step.

    Args:
        place: memory or disk.
        dtype: the type in which numbers are kept; `None` for their own.
        most_rows: how many rows are kept at most; `None` where that is not public, as it is not of users' rows.
        longest_row: the largest number of tokens of a row, a public number.
        folder: the folder for a file.
        processes: the number of processes that keep rows, each for itself.
        rows_per_step: the number of rows of a step on average, a public number; 0 where it is not public.
    """

    place: str
    dtype: torch.dtype | None
    most_rows: int | None
    longest_row: int
    folder: Path
    processes: int = 1
    rows_per_step: int = 0

    def open_store(self, bytes_per_token: float) -> "RowStore":
        """Return an empty store with room for `most_rows`, as far as half of what is free reaches.

        Where their number is not public, half of what is free is set aside, and touched only as rows come.

        Raises:
            ValueError: there can be no file in the folder.
        """
        row_bytes = self.longest_row * bytes_per_token + 8 * ALIGNMENT
        nbytes = None if self.most_rows is None else math.ceil(self.most_rows * row_bytes)
        try:
            return RowStore.open(self.place, nbytes=nbytes, folder=self.folder, share=FREE_SHARE / self.processes)
        except OSError as error:
            raise ValueError(
                f"frozen_cache={self.place}: no file can be made in {self.folder} ({error.strerror}); make room there, "
                "choose another output_dir, or set frozen_cache=memory."
            ) from error


class RowStore:
    """Keeps lists of tensors under keys. An entry for which there is no room is not kept.

    Args:
        buffer: the memory for all entries, uint8 `[bytes]`. It is touched only where entries are.
        reserve: makes sure that so many bytes of the memory can be written to; raises `OSError` if not.

    >>> store = RowStore(torch.empty(256, dtype=torch.uint8))
    >>> store.put(b"row", [torch.tensor([1.0, 2.0]), torch.tensor([[3]])])
    >>> cpu = torch.device("cpu")
    >>> [tensor.tolist() for tensor in store.get(b"row", cpu)], store.get(b"other", cpu) is None
    ([[1.0, 2.0], [[3]]], True)
    """

    def __init__(self, buffer: torch.Tensor, reserve: Callable[[int], None] = lambda nbytes: None) -> None:
        self._buffer = buffer
        self._reserve = reserve
        self._end = 0
        # Whether there was no room for an entry.
        self.is_full = False
        self._places: dict[bytes, list[tuple[int, torch.dtype, torch.Size]]] = {}

    @classmethod
    def open(cls, place: str, *, nbytes: int | None, folder: Path, share: float = FREE_SHARE) -> Self:
        """Return an empty store in memory, or in a file in `folder` that has no name, and ends with this process.

        Args:
            place: memory or disk.
            nbytes: the number of bytes that all entries take at most, by public numbers; `None` if these do not say.
            folder: a folder on the disk to use.
            share: the largest share of what is free.
        """
        free = psutil.virtual_memory().available if place == "memory" else shutil.disk_usage(folder).free
        most = int(share * free)
        room = most if nbytes is None else min(nbytes, most)
        if nbytes is not None and room < nbytes:
            warnings.warn(
                f"frozen_cache={place}: up to {nbytes / 2**30:.1f} GiB would be kept, and half of what is free is "
                f"{room / 2**30:.1f} GiB; rows that do not fit are computed again in each step.",
                stacklevel=2,
            )
        if place == "memory":
            return cls(torch.empty(room, dtype=torch.uint8))
        file = _NamelessFile(folder, max(1, room))
        return cls(torch.frombuffer(file.memory, dtype=torch.uint8), file.reserve)

    @property
    def room(self) -> int:
        """The number of bytes that all entries may take."""
        return len(self._buffer)

    def get(self, key: bytes, device: torch.device) -> list[torch.Tensor] | None:
        """Return the entry under `key` on `device`, which is not to be written to; `None` if there is none."""
        places = self._places.get(key)
        return None if places is None else [self._view(*place).to(device) for place in places]

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def put(self, key: bytes, tensors: Sequence[torch.Tensor]) -> None:
        """Keep `tensors` under `key`, if there is room."""
        places, end = [], self._end
        for tensor in tensors:
            places.append((end, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if end > len(self._buffer) or not self._claim(end):
            self.is_full = True
            return
        for place, tensor in zip(places, tensors, strict=True):
            self._view(*place).copy_(tensor)
        self._end = end
        self._places[key] = places

    def _claim(self, end: int) -> bool:
        try:
            self._reserve(end)
        except OSError:
            return False
        return True

    def _view(self, start: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        stop = start + shape.numel() * dtype.itemsize
        return self._buffer[start:stop].view(dtype).view(shape)


class _NamelessFile:
    """A file that has no name from the beginning, so that it is gone however this process ends.

    Its blocks are claimed before they are written to. Of a disk that others have filled in the meantime, the memory
    that stands for the file could not be written to, and the system would end the process.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(nbytes)
            self.memory = mmap.mmap(file.fileno(), nbytes)
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._nbytes = nbytes
        self._claimed = 0

    def reserve(self, nbytes: int) -> None:
        while self._claimed < nbytes:
            zeros = bytes(min(CLAIMED_BYTES, self._nbytes - self._claimed))
            self._claimed += os.pwrite(self._descriptor, zeros, self._claimed)


def find_folder(dataset: object, default: Path) -> Path:
    """Return the folder in which the files of `dataset` are; `default` if there is none that takes others."""
    with suppress(AttributeError, IndexError, KeyError, TypeError):
        folder = Path(dataset.cache_files[0]["filename"]).parent
        if os.access(folder, os.W_OK):
            return folder
    return default
