"""Memory, or a file without a name, for what is kept of rows from step to step. As private as the rows are."""

import math
import mmap
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch


# Entries begin at multiples of so many bytes, so that tensors of any type can be read in place.
ALIGNMENT = 64


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
        num_rows: the number of rows.
        longest_row: the largest number of tokens of a row, a public number.
        folder: the folder for a file.
    """

    place: str
    dtype: torch.dtype | None
    num_rows: int
    longest_row: int
    folder: Path

    def open_store(self, bytes_per_token: float) -> "RowStore":
        """Return an empty store with room for all rows, as far as half of what is free reaches."""
        nbytes = math.ceil(self.num_rows * (self.longest_row * bytes_per_token + 8 * ALIGNMENT))
        return RowStore.open(self.place, nbytes=nbytes, folder=self.folder)


class RowStore:
    """Keeps lists of tensors under keys. An entry for which there is no room is not kept.

    Args:
        buffer: the memory for all entries, uint8 `[bytes]`. It is touched only where entries are.

    >>> store = RowStore(torch.empty(256, dtype=torch.uint8))
    >>> store.put(b"row", [torch.tensor([1.0, 2.0]), torch.tensor([[3]])])
    >>> cpu = torch.device("cpu")
    >>> [tensor.tolist() for tensor in store.get(b"row", cpu)], store.get(b"other", cpu) is None
    ([[1.0, 2.0], [[3]]], True)
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._end = 0
        self._places: dict[bytes, list[tuple[int, torch.dtype, torch.Size]]] = {}

    @classmethod
    def open(cls, place: str, *, nbytes: int, folder: Path) -> Self:
        """Return an empty store in memory, or in a file in `folder` that has no name, and ends with this process.

        Args:
            place: memory or disk.
            nbytes: the number of bytes that all entries take at most, by public numbers.
            folder: a folder on the disk to use.
        """
        free = psutil.virtual_memory().available if place == "memory" else shutil.disk_usage(folder).free
        room = min(nbytes, int(FREE_SHARE * free))
        if room < nbytes:
            warnings.warn(
                f"frozen_cache={place}: up to {nbytes / 2**30:.1f} GiB would be kept, and half of what is free is "
                f"{room / 2**30:.1f} GiB; rows that do not fit are computed again in each step.",
                stacklevel=2,
            )
        if place == "memory":
            return cls(torch.empty(room, dtype=torch.uint8))
        # Without a name from the beginning, so that it is gone however this process ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(max(1, room))
            return cls(torch.frombuffer(mmap.mmap(file.fileno(), max(1, room)), dtype=torch.uint8))

    def get(self, key: bytes, device: torch.device) -> list[torch.Tensor] | None:
        """Return the entry under `key` on `device`, which is not to be written to; `None` if there is none."""
        places = self._places.get(key)
        return None if places is None else [self._view(*place).to(device) for place in places]

    def put(self, key: bytes, tensors: Sequence[torch.Tensor]) -> None:
        """Keep `tensors` under `key`, if there is room."""
        places, end = [], self._end
        for tensor in tensors:
            places.append((end, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if end > len(self._buffer):
            return
        for place, tensor in zip(places, tensors, strict=True):
            self._view(*place).copy_(tensor)
        self._end = end
        self._places[key] = places

    def _view(self, start: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        stop = start + shape.numel() * dtype.itemsize
        return self._buffer[start:stop].view(dtype).view(shape)


def find_folder(dataset: object, default: Path) -> Path:
    """Return the folder in which the files of `dataset` are; `default` if it is not on a disk."""
    with suppress(AttributeError, IndexError, KeyError, TypeError):
        return Path(dataset.cache_files[0]["filename"]).parent
    return default
