"""From the rows of a logical batch to physical micro-batches.

A row on which a user's code fails contributes nothing, and no one may learn that there was such a row. So if a
micro-batch cannot be collated or evaluated, its rows are tried one by one.
"""

import copy
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from hf_dpzo.data.cutting import count_tokens, cut_into_micro_batches
from hf_dpzo.data.pairs import is_pair, list_sequences, stretch_pair
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.data.sealed import WithheldError, run_sealed


# Types of which a copy may share the values, because they cannot be changed.
_IMMUTABLE_TYPES = {bool, bytes, float, int, str, type(None)}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that are evaluated together.

    Args:
        rows: the rows that were drawn.
        size: the number of rows that the model sees. Those after the drawn rows only fill the shape.
        inputs: the collator's output; `None` for a row on which it failed.
    """

    rows: tuple[FetchedRow, ...]
    size: int
    inputs: Any


@dataclass(frozen=True, kw_only=True)
class LogicalBatch:
    """One Poisson batch.

    Args:
        micro_batches: the micro-batches, in the order in which they are evaluated.
        num_units: the number of units that were drawn. SENSITIVE.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_units: int

    @property
    def row_units(self) -> list[int]:
        """The unit of each row, in the order in which the rows are evaluated."""
        return [row.unit for micro_batch in self.micro_batches for row in micro_batch.rows]

    @property
    def row_slots(self) -> list[int]:
        """The slot of each row among those that were drawn, in the same order."""
        return [row.slot for micro_batch in self.micro_batches for row in micro_batch.rows]


@dataclass(frozen=True, kw_only=True)
class LogicalBatchCollator:
    """Collates the rows of one logical batch into one dataloader item.

    Rows of similar length share a micro-batch, which saves padding, and are cut so that a row moves few others to other
    micro-batches: see `cut_into_micro_batches`. Only rows with the same fields, of the same types, share one, because a
    collator may take these from the first row.

    With `padded_lengths`, each micro-batch has one of a few public shapes, whatever rows it holds. Its rows are padded
    to the smallest of these lengths that holds them, and copies of one of them fill it up to `micro_batch_size`. At
    least one row is such a copy, stretched to that length, so that any collator pads to it. A row that is longer than
    all lengths contributes nothing.

    Args:
        collate: turns a list of rows into the model's inputs.
        micro_batch_size: the largest number of rows in a micro-batch; with `padded_lengths`, the exact number.
        padded_lengths: public lengths, in tokens, ascending; empty for no padding to public shapes.
    """

    collate: Callable[[list[Any]], Any]
    micro_batch_size: int
    padded_lengths: tuple[int, ...] = ()

    def __call__(self, rows: Sequence[FetchedRow]) -> dict[str, LogicalBatch]:
        """Return `{"batch": ...}`, a `LogicalBatch` of all drawn units. An empty batch has no micro-batches."""
        num_units = max((row.unit + 1 for row in rows), default=0)
        micro_batches = tuple(item for group in self._group_rows(rows) for item in self._build_micro_batches(group))
        return {"batch": LogicalBatch(micro_batches=micro_batches, num_units=num_units)}

    def split_into_rows(self, micro_batch: MicroBatch) -> tuple[MicroBatch, ...]:
        """Return a micro-batch of the same shape for each row. A row that cannot be collated alone has no inputs."""
        return tuple(item for row in micro_batch.rows for item in self._build_micro_batches((row,)))

    def raise_collation_error(self, rows: Sequence[Any]) -> None:
        """Collate public `rows` unsealed, so that the collator's own error is raised if it fails."""
        self._collate_rows(tuple(FetchedRow(unit=0, row=row, slot=0) for row in rows))

    def _group_rows(self, rows: Sequence[FetchedRow]) -> Iterator[tuple[FetchedRow, ...]]:
        alike: dict[tuple, list[FetchedRow]] = {}
        for row in sorted((row for row in rows if row.row is not None), key=lambda row: count_tokens(row.row)):
            alike.setdefault((self._padded_length(row), get_row_signature(row.row)), []).append(row)
        for (length, _), fitting in alike.items():
            if length is None:
                yield from cut_into_micro_batches(fitting, self.micro_batch_size)
            elif length != 0:
                for start in range(0, len(fitting), self._capacity):
                    yield tuple(fitting[start : start + self._capacity])

    @property
    def _capacity(self) -> int:
        """The number of drawn rows of a micro-batch of a public shape."""
        return max(1, self.micro_batch_size - 1)

    def _padded_length(self, row: FetchedRow) -> int | None:
        """Return the length to pad a row to: `None` without `padded_lengths`, and 0 for a row that is too long."""
        if not self.padded_lengths:
            return None
        return next((length for length in self.padded_lengths if length >= count_tokens(row.row)), 0)

    def _build_micro_batches(self, rows: tuple[FetchedRow, ...]) -> tuple[MicroBatch, ...]:
        """Return one micro-batch, or if that fails one for each row. A row that fails alone has no inputs."""
        try:
            return (run_sealed("data_collator", lambda: self._collate_rows(rows)),)
        except WithheldError:
            if len(rows) > 1:
                return tuple(item for row in rows for item in self._build_micro_batches((row,)))
            return (MicroBatch(rows=(replace(rows[0], row=None),), size=1, inputs=None),)

    def _collate_rows(self, rows: tuple[FetchedRow, ...]) -> MicroBatch:
        physical = [row.row for row in rows]
        length = self._padded_length(rows[0])
        if self._has_fixed_shapes:
            physical += [stretch_row(physical[0], length)] * (self.micro_batch_size - len(rows))
        # The collator gets copies, because it may change the rows, and with them the data.
        inputs = self.collate([copy_row(row) for row in physical])
        sequences = self.micro_batch_size * max(1, len(list_sequences(physical[0])))  # A pair has two.
        if self._has_fixed_shapes and tuple(inputs["input_ids"].shape[:2]) != (sequences, length):
            raise ValueError(f"padded_lengths={self.padded_lengths}: the collator does not pad to the longest row.")
        micro_batch = MicroBatch(rows=rows, size=len(physical), inputs=inputs)
        if get_worker_info() is not None:
            pickle.dumps(micro_batch)  # A worker that cannot send it would print the reason, and wait for ever.
        return micro_batch

    @property
    def _has_fixed_shapes(self) -> bool:
        """Whether micro-batches are filled up to public shapes."""
        return bool(self.padded_lengths) and self.micro_batch_size > 1


def get_row_signature(row: Any) -> tuple:
    """Return what a collator may take from one row for all: the names of its fields, and the type of each.

    The types are compared, not their names, which two types may have.

    >>> get_row_signature({"input_ids": [5, 6], "labels": None})
    (<class 'dict'>, ('input_ids', <class 'list'>, frozenset({<class 'int'>})), ('labels', <class 'NoneType'>))
    """
    fields = row.items() if isinstance(row, Mapping) else ()
    return type(row), *((str(name), *_get_type_signature(value)) for name, value in fields)


def _get_type_signature(value: Any) -> tuple[Hashable, ...]:
    """Return the type of a value, and the types of what it contains, or an array's type and number of dimensions."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value), str(value.dtype), value.ndim
    return (type(value), frozenset(map(type, value))) if isinstance(value, list | tuple) else (type(value),)


def copy_row(row: Any) -> Any:
    """Return a deep copy. For lists of numbers or texts, such as tokens, it takes a tenth of `copy.deepcopy`'s time.

    >>> row = {"input_ids": [5, 6], "spans": [[0, 1]]}
    >>> copy = copy_row(row)
    >>> copy == row, any(copy[name] is row[name] for name in row), copy["spans"][0] is row["spans"][0]
    (True, False, False)
    """
    if type(row) is not dict:
        return copy.deepcopy(row)
    flat = {name: type(value) is list and set(map(type, value)) <= _IMMUTABLE_TYPES for name, value in row.items()}
    return {name: value.copy() if flat[name] else copy.deepcopy(value) for name, value in row.items()}


def stretch_row(row: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a row like `row`, of `length` tokens: each field with an integer per token is repeated to that length.

    >>> stretch_row({"input_ids": [5, 6], "labels": 1}, 3)
    {'input_ids': [5, 6, 5], 'labels': 1}
    """
    if is_pair(row):
        return stretch_pair(row, length)
    tokens = count_tokens(row)
    return {
        name: _repeat_to_length(value, length) if _is_per_token(value, tokens) else value for name, value in row.items()
    }


def _is_per_token(value: Any, tokens: int) -> bool:
    """Return whether `value` has an integer for each token. Floats are something else, such as a row's many labels."""
    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and len(value) == tokens and not value.is_floating_point()
    return isinstance(value, list) and len(value) == tokens and isinstance(value[0], int)


def _repeat_to_length(value: Any, length: int) -> Any:
    places = [place % len(value) for place in range(length)]
    return value[places] if isinstance(value, torch.Tensor) else [value[place] for place in places]
