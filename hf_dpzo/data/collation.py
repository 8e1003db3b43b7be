"""From the rows of a logical batch to physical micro-batches.

A row that somebody's code fails on contributes nothing, and nobody learns that there was one. So where a micro-batch
can not be made or evaluated, its rows are tried one by one.
"""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.data.sealed import WithheldError, run_sealed


# Types whose values nobody can change.
_IMMUTABLE_TYPES = {bool, bytes, float, int, str, type(None)}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that are evaluated together.

    Args:
        rows: the rows that were drawn.
        size: how many rows the model sees; those behind the drawn ones only fill the shape.
        inputs: what the collator made of them; `None` for a row that it failed on.
    """

    rows: tuple[FetchedRow, ...]
    size: int
    inputs: Any


@dataclass(frozen=True, kw_only=True)
class LogicalBatch:
    """One Poisson batch.

    Args:
        micro_batches: in which its rows are evaluated.
        num_units: how many units were drawn.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_units: int

    @property
    def row_units(self) -> list[int]:
        """The unit of each row, in the order in which they are evaluated."""
        return [row.unit for micro_batch in self.micro_batches for row in micro_batch.rows]

    @property
    def row_slots(self) -> list[int]:
        """The place of each row among those that were drawn, in the same order."""
        return [row.slot for micro_batch in self.micro_batches for row in micro_batch.rows]


@dataclass(frozen=True, kw_only=True)
class LogicalBatchCollator:
    """Makes one dataloader item of one logical batch.

    Rows are put in order of length first, which cuts padding. The order makes no difference to the sum. Only rows with
    the same fields, of the same types, share a micro-batch: a collator may take these from whichever row is first. With
    `padded_lengths`, each micro-batch has one of a few public shapes, whatever rows it holds: its rows are padded to
    the least of these lengths that holds them, and filled up with copies of one of them to `micro_batch_size`. One
    place is always a copy, stretched to that length, so that any collator pads to it. A longer row has no content.

    Args:
        collate: makes inputs of a list of rows.
        micro_batch_size: rows in a micro-batch, at most; with `padded_lengths` exactly.
        padded_lengths: public lengths, in tokens, ascending.
    """

    collate: Callable[[list[Any]], Any]
    micro_batch_size: int
    padded_lengths: tuple[int, ...] = ()

    def __call__(self, rows: Sequence[FetchedRow]) -> dict[str, LogicalBatch]:
        """Return `{"batch": ...}`, with one unit for each that was drawn, and no micro-batches for an empty batch."""
        num_units = max((row.unit + 1 for row in rows), default=0)
        micro_batches = tuple(one for group in self._groups(rows) for one in self._build_micro_batches(group))
        return {"batch": LogicalBatch(micro_batches=micro_batches, num_units=num_units)}

    def split_into_rows(self, micro_batch: MicroBatch) -> tuple[MicroBatch, ...]:
        """Its rows one by one, in the same shape. A row that even so can not be collated has no inputs."""
        return tuple(one for row in micro_batch.rows for one in self._build_micro_batches((row,)))

    def raise_collation_error(self, rows: Sequence[Any]) -> None:
        """Raise what is withheld where public `rows` can not be collated."""
        self._collate_rows(tuple(FetchedRow(unit=0, row=row, slot=0) for row in rows))

    def _groups(self, rows: Sequence[FetchedRow]) -> Iterator[tuple[FetchedRow, ...]]:
        alike: dict[tuple, list[FetchedRow]] = {}
        for row in sorted((row for row in rows if row.row is not None), key=lambda row: count_tokens(row.row)):
            alike.setdefault((self._padded_length(row), get_row_signature(row.row)), []).append(row)
        for (length, _), fitting in alike.items():
            if length != 0:
                for start in range(0, len(fitting), self._capacity):
                    yield tuple(fitting[start : start + self._capacity])

    @property
    def _capacity(self) -> int:
        return max(1, self.micro_batch_size - 1) if self.padded_lengths else self.micro_batch_size

    def _padded_length(self, row: FetchedRow) -> int | None:
        """The shape that a row belongs to: `None` for any, and 0, which no shape is, for a row that is too long."""
        if not self.padded_lengths:
            return None
        return next((length for length in self.padded_lengths if length >= count_tokens(row.row)), 0)

    def _build_micro_batches(self, rows: tuple[FetchedRow, ...]) -> tuple[MicroBatch, ...]:
        """One micro-batch; where that fails one for each row, and a row that fails alone has no inputs."""
        try:
            return (run_sealed("data_collator", lambda: self._collate_rows(rows)),)
        except WithheldError:
            if len(rows) > 1:
                return tuple(one for row in rows for one in self._build_micro_batches((row,)))
            return (MicroBatch(rows=(replace(rows[0], row=None),), size=1, inputs=None),)

    def _collate_rows(self, rows: tuple[FetchedRow, ...]) -> MicroBatch:
        physical, length = [row.row for row in rows], self._padded_length(rows[0])
        if self._has_fixed_shapes:
            physical += [stretch_row(physical[0], length)] * (self.micro_batch_size - len(rows))
        # Copies, for collators may change what they are given, and the data with it.
        inputs = self.collate([copy_row(row) for row in physical])
        if self._has_fixed_shapes and tuple(inputs["input_ids"].shape[:2]) != (self.micro_batch_size, length):
            raise ValueError(f"padded_lengths={self.padded_lengths}: the collator does not pad to the longest row.")
        made = MicroBatch(rows=rows, size=len(physical), inputs=inputs)
        if get_worker_info() is not None:
            pickle.dumps(made)  # Where a worker can not send it, it would wait for ever, after showing why.
        return made

    @property
    def _has_fixed_shapes(self) -> bool:
        """Whether micro-batches are filled up to public shapes."""
        return bool(self.padded_lengths) and self.micro_batch_size > 1


def count_tokens(row: Any) -> int:
    """Tokens of a row; 0 where it has none."""
    tokens = row.get("input_ids") if isinstance(row, dict) else None
    try:
        return len(tokens)
    except Exception:  # As a number, or a tensor of one, has none. Whatever is wrong with it must not show.
        return 0


def get_row_signature(row: Any) -> tuple:
    """What a collator may take from one row for all: its fields, and the type of each.

    >>> get_row_signature({"input_ids": [5, 6], "labels": None})
    (('input_ids', 'list', 'int', ''), ('labels', 'NoneType', '', ''))
    """
    if not isinstance(row, dict):
        return (type(row).__name__,)
    return tuple((str(name), *_get_type_signature(value)) for name, value in row.items())


def _get_type_signature(value: Any) -> tuple[str, str, str]:
    """The type of a value, and of what is in it; for an array also its number of dimensions."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value).__name__, str(value.dtype), str(value.ndim)
    inside = set(map(type, value)) if isinstance(value, list | tuple) else ()
    return type(value).__name__, ",".join(sorted({one.__name__ for one in inside})), ""


def copy_row(row: Any) -> Any:
    """Return a deep copy. Of lists of numbers or texts, which tokens come in, this is a tenth of the work.

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
    """Return a row like `row` of `length` tokens: what it has for each token is repeated.

    >>> stretch_row({"input_ids": [5, 6], "labels": 1}, 3)
    {'input_ids': [5, 6, 5], 'labels': 1}
    """
    tokens = count_tokens(row)
    return {
        name: _repeat_to_length(value, length) if _is_per_token(value, tokens) else value for name, value in row.items()
    }


def _is_per_token(value: Any, tokens: int) -> bool:
    """Whether `value` has an integer for each token. Floats, such as many labels of a row, may only look like it."""
    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and len(value) == tokens and not value.is_floating_point()
    return isinstance(value, list) and len(value) == tokens and isinstance(value[0], int)


def _repeat_to_length(value: Any, length: int) -> Any:
    places = [place % len(value) for place in range(length)]
    return value[places] if isinstance(value, torch.Tensor) else [value[place] for place in places]
