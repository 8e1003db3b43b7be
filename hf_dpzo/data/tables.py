"""Rows that are numbers of one shape, in one table: a batch of them is taken by one index, and not row by row.

What holds for other rows holds for these: no row moves another's loss, and none that fails shows. A block of rows has
one public number of rows, whatever rows it holds, and is filled up with zeros.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hf_dpzo.data.collation import LogicalBatch, MicroBatch
from hf_dpzo.data.sampling import BroadcastBatchSampler, FetchedRow, PoissonBatchSampler


# The rows of a block, at most: enough for one product of matrices to be fast, and few enough for its results to fit a
# core's cache.
LARGEST_BLOCK = 2048


# Batches larger than expected by more deviations than this take a block more.
_DEVIATIONS = 2


def choose_block_size(expected_batch_size: int, num_units: int, *, max_rows_per_unit: int = 1) -> int:
    """Return the number of rows of a block, by public numbers alone: as few as fill most batches without waste.

    Args:
        expected_batch_size: the expected number of units in a batch.
        num_units: the number of units.
        max_rows_per_unit: the largest number of rows that a unit brings to a batch.

    >>> choose_block_size(256, 5000), choose_block_size(5000, 5000)
    (288, 1667)
    """
    usual = min(num_units, math.ceil(expected_batch_size + _DEVIATIONS * math.sqrt(expected_batch_size)))
    rows = usual * max_rows_per_unit
    return math.ceil(rows / math.ceil(rows / LARGEST_BLOCK))


@dataclass(kw_only=True)
class Table(Dataset):
    """The columns of all rows, in memory. SENSITIVE.

    Args:
        columns: each column by its name, `[rows, ...]`.
    """

    columns: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitems__(self, drawn: np.ndarray) -> "DrawnRows":
        """Return the rows of an array of units, rows and keys, `[rows, 3]`. A dataloader fetches a batch by this."""
        return DrawnRows(table=self, units=drawn[:, 0], rows=torch.from_numpy(np.ascontiguousarray(drawn[:, 1])))


@dataclass(frozen=True, kw_only=True)
class DrawnRows:
    """Rows of a table that were drawn for a batch.

    Args:
        table: the table.
        units: the number of each row's unit among the batch's units, int64 `[rows]`.
        rows: the number of each row, int64 `[rows]`.
    """

    table: Table
    units: np.ndarray
    rows: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TableBlock:
    """Rows of a table that are evaluated together: a `MicroBatch` whose inputs are taken when they are needed.

    Args:
        table: the table.
        numbers: the numbers of the rows, int64 `[rows]`.
        size: the number of rows that the model sees. Those after the drawn rows are zeros.
    """

    table: Table
    numbers: torch.Tensor
    size: int

    @property
    def rows(self) -> torch.Tensor:
        """The rows that were drawn, by their numbers."""
        return self.numbers

    def copy_inputs(self) -> dict[str, torch.Tensor]:
        """Return the columns of the rows, in memory of their own."""
        return {name: self._take(column) for name, column in self.table.columns.items()}

    def _take(self, column: torch.Tensor) -> torch.Tensor:
        numbers = self.numbers.to(column.device)
        if len(numbers) == self.size:
            return column.index_select(0, numbers)
        taken = column.new_zeros((self.size, *column.shape[1:]))
        taken[: len(numbers)] = column.index_select(0, numbers)
        return taken


@dataclass(frozen=True, kw_only=True)
class TableBatch(LogicalBatch):
    """A Poisson batch of rows of a table.

    Args:
        units: the number of each row's unit among the batch's units, int64 `[rows]`.
    """

    units: np.ndarray

    @property
    def row_units(self) -> np.ndarray:
        """The unit of each row, in the order in which the rows are evaluated."""
        return self.units

    @property
    def row_slots(self) -> range:
        """The slot of each row among those that were drawn, in the same order."""
        return range(len(self.units))


@dataclass(frozen=True, kw_only=True)
class TableCollator:
    """Cuts a batch of rows of a table into blocks of one public size.

    Args:
        micro_batch_size: the number of rows of a block.
        device: the device of what is made of public rows.

    Public rows, which are mappings and not in the table, become blocks of the same size.
    """

    micro_batch_size: int
    device: torch.device
    padded_lengths: tuple[int, ...] = ()

    def __call__(self, drawn: DrawnRows | Sequence[FetchedRow]) -> dict[str, LogicalBatch]:
        """Return `{"batch": ...}`, a `LogicalBatch` of all drawn units. An empty batch has no blocks."""
        if not isinstance(drawn, DrawnRows):
            return {"batch": self._collate_public(drawn)}
        blocks = tuple(self._block(drawn.table, numbers) for numbers in self._cut(drawn.rows))
        num_units = int(drawn.units[-1]) + 1 if len(drawn.units) else 0
        return {"batch": TableBatch(micro_batches=blocks, num_units=num_units, units=drawn.units)}

    def split_into_rows(self, block: TableBlock) -> tuple[TableBlock, ...]:
        """Return a block of the same shape for each row."""
        return tuple(self._block(block.table, number) for number in block.numbers.split(1))

    def raise_collation_error(self, rows: Sequence[Any]) -> None:
        """Do nothing: there is no user's code here that could fail."""

    def _cut(self, numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return numbers.split(self.micro_batch_size) if len(numbers) else ()

    def _block(self, table: Table, numbers: torch.Tensor) -> TableBlock:
        return TableBlock(table=table, numbers=numbers, size=self.micro_batch_size)

    def _collate_public(self, rows: Sequence[FetchedRow]) -> LogicalBatch:
        parts = [rows[start : start + self.micro_batch_size] for start in range(0, len(rows), self.micro_batch_size)]
        batches = tuple(
            MicroBatch(rows=tuple(part), size=self.micro_batch_size, inputs=self._stack([row.row for row in part]))
            for part in parts
        )
        return LogicalBatch(micro_batches=batches, num_units=len(rows))

    def _stack(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]).to(self.device) for name in rows[0]}
        table = Table(columns=columns)
        return TableBlock(table=table, numbers=torch.arange(len(rows)), size=self.micro_batch_size).copy_inputs()


class TableBatchSampler(Sampler[np.ndarray]):
    """Draws the batches of another sampler as arrays, without an object for each row.

    Args:
        sampler: the sampler.
    """

    def __init__(self, sampler: PoissonBatchSampler | BroadcastBatchSampler) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._sampler.draw_arrays()

    @property
    def own_rows(self) -> np.ndarray:
        """The numbers of the rows that the sampler may draw, int64 `[rows]`."""
        return self._sampler.own_rows
