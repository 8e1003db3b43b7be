"""Where rows come from: copies of a row that a data set's own structure shows.

Index tables, subsets, concatenations and shared memory say that two rows are one. Equal rows that were written twice,
in a file or in a list, are not searched for: that would read all rows, and two people may have equal ones.
"""

from collections.abc import Collection, Iterator, Mapping, Sized
from typing import Any

import datasets
import numpy as np
from datasets.table import ConcatenationTable, MemoryMappedTable
from torch.utils.data import Dataset


# The rows of a source have numbers below this.
_STRIDE = 1 << 33


def has_repeated_rows(dataset: Any) -> bool:
    """Return whether the structure of `dataset` shows that it holds a row more than once. No row is read.

    >>> from torch.utils.data import Subset
    >>> rows = [{"input_ids": [5]}, {"input_ids": [6]}]
    >>> has_repeated_rows(Subset(rows, [0, 1])), has_repeated_rows(Subset(rows, [0, 0]))
    (False, True)
    """
    numbers = _Origins().number_rows(dataset)
    return not (np.diff(numbers) > 0).all() and len(np.unique(numbers)) < len(numbers)


class _Origins:
    """Numbers rows, so that two rows have the same number where they are one."""

    def __init__(self) -> None:
        self._sources: dict[Any, int] = {}

    def number_rows(self, dataset: Any) -> np.ndarray:
        """Return the number of each row of `dataset`, int64 `[rows]`."""
        if isinstance(dataset, datasets.Dataset):
            return self._number_table(dataset)
        inside = getattr(dataset, "__dict__", {})
        indices, parts = inside.get("indices"), inside.get("datasets")
        inner = _find_inner(inside)
        numbered = None
        if inner is not None and indices is not None:
            numbered = self._number_selected(inner, indices)
        elif inner is not None:
            numbered = self.number_rows(inner)
        elif isinstance(parts, Collection):
            numbered = self._number_parts([*(parts.values() if isinstance(parts, Mapping) else parts)], len(dataset))
        if not _differ(numbered, dataset):
            return numbered
        inner = inside.get("dataset")
        if _is_longer(dataset, inner):  # So some of its rows come from one row, whichever.
            return self.number_rows(inner)[np.arange(len(dataset)) % max(1, len(inner))]
        # A class that chooses its rows in another way than torch's own shows nothing.
        return self._number_source(id(dataset), len(dataset))

    def _number_source(self, key: Any, length: int, start: int = 0) -> np.ndarray:
        first = self._sources.setdefault(key, len(self._sources) + 1) * _STRIDE
        return first + start + np.arange(length, dtype=np.int64)

    def _number_selected(self, dataset: Any, indices: Any) -> np.ndarray | None:
        try:
            places = np.asarray(indices, dtype=np.int64)
            return self.number_rows(dataset)[places] if places.ndim == 1 else None
        except (TypeError, ValueError, IndexError):
            return None

    def _number_parts(self, parts: list[Any], length: int) -> np.ndarray | None:
        """Number rows that stand one after the other, or beside each other as the parts of one row."""
        numbered = [self.number_rows(part) for part in parts]
        if sum(len(numbers) for numbers in numbered) == length:
            return np.concatenate(numbered) if numbered else None
        if {len(numbers) for numbers in numbered} == {length}:
            _, together = np.unique(np.stack(numbered), axis=1, return_inverse=True)
            return self._number_source(tuple(map(id, parts)), length)[together.reshape(-1)]
        return None

    def _number_table(self, dataset: datasets.Dataset) -> np.ndarray:
        data = dataset.data
        blocks = [row[0] for row in data.blocks] if isinstance(data, ConcatenationTable) else [data]
        numbered = [numbers for block in blocks for numbers in self._number_block(block)]
        rows = np.concatenate(numbered) if numbered else np.arange(0, dtype=np.int64)
        # A table of one column; None if all rows are there in order.
        chosen = dataset._indices
        return rows if chosen is None else rows[chosen.column(0).to_numpy()]

    def _number_block(self, block: Any) -> Iterator[np.ndarray]:
        """Number the rows of a block of a table, by the file that they are in or else by the memory."""
        if isinstance(block, MemoryMappedTable):
            # Only these replayed calls change which rows a table has. A slice of a slice begins where both say.
            slices = [arguments[0] for name, arguments, _ in block.replays if name == "slice"]
            filters = [call for call in block.replays if call[0] == "filter"]
            yield self._number_source((block.path, str(filters)), block.num_rows, start=sum(slices))
            return
        for place, chunk in _list_chunks(block):
            addresses = tuple(buffer.address for buffer in chunk.buffers() if buffer is not None)
            yield self._number_source(addresses or (id(block), place), len(chunk), start=chunk.offset)


def _find_inner(inside: Mapping[str, Any]) -> Any:
    """Return the data set that a wrapper's attributes hold, by its name or as the only one; `None` if none does."""
    if inside.get("dataset") is not None:
        return inside["dataset"]
    held = [value for value in inside.values() if isinstance(value, datasets.Dataset | Dataset)]
    return held[0] if len(held) == 1 else None


def _is_longer(dataset: Any, inner: Any) -> bool:
    return isinstance(inner, Sized) and 0 < len(inner) < len(dataset)


def _list_chunks(block: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(block.column(0).chunks if block.num_columns else ())


def _differ(numbered: np.ndarray | None, dataset: Any) -> bool:
    return numbered is None or len(numbered) != len(dataset)
