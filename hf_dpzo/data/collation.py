"""From the rows of a logical batch to physical micro-batches.

A row on which a user's code fails contributes nothing, and no one may learn that there was such a row. So if a
micro-batch cannot be collated or evaluated, its rows are tried one by one.
"""

import copy
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import get_worker_info

from hf_dpzo.data.cutting import count_tokens, cut_into_micro_batches
from hf_dpzo.data.filler import WAVE_FIELD, stretch_row
from hf_dpzo.data.pairs import is_pair
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.data.suffix import SuffixRule


# The fields with the tokens that are read.
TOKEN_FIELDS = ("input_ids", "attention_mask", "token_type_ids")


# Types of which a copy may share the values, because they cannot be changed.
_IMMUTABLE_TYPES = {bool, bytes, float, int, str, type(None)}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that are evaluated together.

    Args:
        rows: the rows that were drawn.
        size: the number of rows that the model sees. Those after the drawn rows only fill the shape.
        inputs: the collator's output; `None` for a row on which it failed.
        suffix_length: the number of each row's last tokens that hold all that an activated adapter can change; `None`
            if the rows are evaluated as a whole.
    """

    rows: tuple[FetchedRow, ...]
    size: int
    inputs: Any
    suffix_length: int | None = None

    def copy_inputs(self) -> Any:
        """Return the inputs in memory of their own, because a model or a loss may write into them."""
        return copy.deepcopy(self.inputs)


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
        written_fields: the fields with the tokens that a decoder writes, which have a length of their own. They are
            padded to the same public lengths.
        suffix_rule: the rule by which rows are evaluated from an invocation on; `None` if all are evaluated as a whole.
            Rows with suffixes of the same public length share a micro-batch.
        beginning_length: the number of tokens that rows begin with and that a copy keeps when it is stretched, so that
            it is read as they are.
    """

    collate: Callable[[list[Any]], Any]
    micro_batch_size: int
    padded_lengths: tuple[int, ...] = ()
    written_fields: tuple[str, ...] = ()
    suffix_rule: SuffixRule | None = None
    beginning_length: int = 0

    def __call__(self, rows: Sequence[FetchedRow]) -> dict[str, LogicalBatch]:
        """Return `{"batch": ...}`, a `LogicalBatch` of all drawn units. An empty batch has no micro-batches."""
        num_units = max((row.unit + 1 for row in rows), default=0)
        micro_batches = tuple(item for group in self._group_rows(rows) for item in self._build_micro_batches(group))
        return {"batch": LogicalBatch(micro_batches=micro_batches, num_units=num_units)}

    def split_into_rows(self, micro_batch: MicroBatch) -> tuple[MicroBatch, ...]:
        """Return a micro-batch of the same shape for each row. A row that cannot be collated alone has no inputs."""
        return tuple(item for row in micro_batch.rows for item in self._build_micro_batches((row,)))

    def with_rows_alone(self) -> Self:
        """Return a collator like this one that gives each row a micro-batch of its own, without padding."""
        return replace(self, micro_batch_size=1, padded_lengths=())

    def raise_collation_error(self, rows: Sequence[Any]) -> None:
        """Collate public `rows` unsealed, so that the collator's own error is raised if it fails."""
        self._collate_rows(tuple(FetchedRow(unit=0, row=row, slot=0) for row in rows))

    def _group_rows(self, rows: Sequence[FetchedRow]) -> Iterator[tuple[FetchedRow, ...]]:
        alike: dict[tuple, list[FetchedRow]] = {}
        for row in sorted((row for row in rows if row.row is not None), key=lambda row: count_tokens(row.row)):
            key = (self._padded_length(row), get_row_signature(row.row), self._suffix_length(row))
            alike.setdefault(key, []).append(row)
        for (length, *_), fitting in alike.items():
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
        longest = max([count_tokens(row.row), *(_count(row.row, name) for name in self.written_fields)])
        return next((length for length in self.padded_lengths if length >= longest), 0)

    def _suffix_length(self, row: FetchedRow) -> int | None:
        """See `SuffixRule.choose_length`."""
        if self.suffix_rule is None:
            return None
        return self.suffix_rule.choose_length(row.row, fixed_shapes=self.has_fixed_shapes)

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
        if self.has_fixed_shapes:
            filler = stretch_row(physical[0], length, kept=self.beginning_length, written_fields=self.written_fields)
            physical += [filler] * (self.micro_batch_size - len(rows))
        # The collator gets copies, because it may change the rows, and with them the data.
        inputs = self.collate([copy_row(row) for row in physical])
        size = len(physical) * (2 if is_pair(rows[0].row) else 1)
        if self.has_fixed_shapes and not self._is_padded(inputs, size, length):
            raise ValueError(f"padded_lengths={self.padded_lengths}: the collator does not pad to the longest row.")
        suffix_length = self._suffix_length(rows[0])
        if suffix_length == 0:
            suffix_length = max(self.suffix_rule.measure(row.row) for row in rows)
        micro_batch = MicroBatch(rows=rows, size=len(physical), inputs=inputs, suffix_length=suffix_length)
        if get_worker_info() is not None:
            pickle.dumps(micro_batch)  # A worker that cannot send it would print the reason, and wait for ever.
        return micro_batch

    def _is_padded(self, inputs: Mapping[str, Any], size: int, length: int) -> bool:
        """Return whether the collator has padded all that a row may be of different length in."""
        padded = [inputs[name] for name in (*TOKEN_FIELDS, *self.written_fields) if name in inputs]
        padded += [inputs[name] for name in (WAVE_FIELD,) if name in inputs and inputs[name].ndim == 2]
        return all(len(one) == size and one.shape[-1] == length for one in padded)

    @property
    def has_fixed_shapes(self) -> bool:
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
    """Return the type of a value, and the types of what it contains, or an array's type and number of dimensions.

    Of several lists of tokens it has the number too: a collator may take the number of a row's choices from one row.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        has_choices = value.ndim > 1 and "float" not in str(value.dtype)
        return type(value), str(value.dtype), value.ndim, value.shape[0] if has_choices else None
    if not isinstance(value, list | tuple):
        return (type(value),)
    kinds = frozenset(map(type, value))
    return (type(value), kinds, len(value)) if kinds & {list, tuple} else (type(value), kinds)


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


def _count(row: Any, name: str) -> int:
    """Return the length of a field of `row`; 0 if it has none."""
    try:
        return len(row[name])
    except Exception:  # No error may show.
        return 0
