"""Poisson batches: each unit joins each batch independently and secretly.

The number of rows in a batch is itself secret. Nothing here counts, logs or keeps it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.privacy.noise import BernoulliSampler


@dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """The number of a row that was drawn, that of its unit among those of its batch, and its place in the batch."""

    unit: int
    row: int
    slot: int


@dataclass(frozen=True, kw_only=True)
class FetchedRow:
    """A row that was drawn; `None` for one that could not be fetched."""

    unit: int
    row: Any
    slot: int


class PoissonBatchSampler(Sampler[list[DrawnRow]]):
    """Yields the rows of batches, some of them empty. Two passes never agree: there is no seed.

    Each unit belongs to one process, which draws by itself whether it joins. So what all processes draw is one Poisson
    batch, and none of them knows it.

    Args:
        units: whose rows they are.
        sampling_rate: the probability with which each unit joins a batch.
        rank: of this process.
        num_processes: how many there are.

    >>> sampler = PoissonBatchSampler(units=Units(num_rows=4), sampling_rate=0.5)
    >>> len(sampler), len(list(sampler))
    (2, 2)
    """

    def __init__(self, *, units: Units, sampling_rate: float, rank: int = 0, num_processes: int = 1) -> None:
        self._units, self._own_units = units, range(rank, len(units), num_processes)
        self._mask = BernoulliSampler(size=len(self._own_units), rate=sampling_rate)

    def __len__(self) -> int:
        """Batches per epoch: as many as use each unit once on average."""
        return steps_per_epoch(self._mask.rate)

    def __iter__(self) -> Iterator[list[DrawnRow]]:
        for _ in range(len(self)):
            units = [self._own_units[place] for place in np.flatnonzero(self._mask.draw())]
            rows = [(i, row) for i, unit in enumerate(units) for row in self._units.draw_rows(unit)]
            yield [DrawnRow(unit=i, row=row, slot=place) for place, (i, row) in enumerate(rows)]


def steps_per_epoch(sampling_rate: float) -> int:
    """How many Poisson batches use each unit once on average.

    >>> steps_per_epoch(0.016)
    62
    """
    return max(1, round(1 / sampling_rate))


class SealedRows(Dataset):
    """The rows of a data set, fetched under seal. One that can not be fetched is a row without content.

    Args:
        dataset: whose rows they are.
        dropped_column: a column that only says whose a row is.
    """

    def __init__(self, dataset: Dataset, *, dropped_column: str | None = None) -> None:
        self._dataset, self._dropped_column = dataset, dropped_column

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, drawn: list[DrawnRow]) -> list[FetchedRow]:
        """The rows that were drawn: what a dataloader asks for a batch with."""
        try:
            return run_sealed("train_dataset", lambda: [self._fetch(one) for one in drawn])
        except WithheldError:
            return [self._fetch_alone(one) for one in drawn]

    def _fetch_alone(self, one: DrawnRow) -> FetchedRow:
        try:
            return run_sealed("train_dataset", lambda: self._fetch(one))
        except WithheldError:
            return FetchedRow(unit=one.unit, row=None, slot=one.slot)

    def _fetch(self, one: DrawnRow) -> FetchedRow:
        row = self._dataset[one.row]
        if isinstance(row, Mapping):  # Such as what a tokenizer returns.
            row = {name: value for name, value in row.items() if name != self._dropped_column}
        return FetchedRow(unit=one.unit, row=row, slot=one.slot)


def batch_capacity(expected_batch_size: int, *, max_rows_per_unit: int = 1) -> int:
    """Return how many rows a batch has room for, a public number that no Poisson batch exceeds in practice.

    A batch of more than twelve standard deviations and forty units above its mean has a probability below 1e-17. Its
    last rows would be left out.

    Args:
        expected_batch_size: units in a batch, on average.
        max_rows_per_unit: of a unit.

    >>> batch_capacity(64), batch_capacity(64, max_rows_per_unit=2)
    (200, 400)
    """
    return math.ceil(expected_batch_size + 12 * math.sqrt(expected_batch_size) + 40) * max_rows_per_unit


def build_batch_sampler(
    units: Units, sampling_rate: float, processes: Processes, *, capacity: int | None
) -> Sampler[list[DrawnRow]]:
    """Return this process' batches: of its share of the units, or with a `capacity`, the same in each."""
    if capacity is None:
        return PoissonBatchSampler(
            units=units, sampling_rate=sampling_rate, rank=processes.rank, num_processes=processes.size
        )
    return BroadcastBatchSampler(
        PoissonBatchSampler(units=units, sampling_rate=sampling_rate), processes, capacity=capacity
    )


class BroadcastBatchSampler(Sampler[list[DrawnRow]]):
    """The batches that the first process draws, in all processes.

    Args:
        sampler: draws them, from all units; the others do not use theirs.
        processes: of the run.
        capacity: the number of rows that a batch has room for.
    """

    def __init__(self, sampler: Sampler[list[DrawnRow]], processes: Processes, *, capacity: int) -> None:
        self._sampler, self._processes, self._capacity = sampler, processes, capacity

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[DrawnRow]]:
        batches = iter(self._sampler) if self._processes.is_first else iter(())
        for _ in range(len(self)):
            table = np.full((self._capacity, 2), -1, dtype=np.int64)
            for one in next(batches, [])[: self._capacity]:
                table[one.slot] = one.unit, one.row
            told = self._processes.broadcast(table).tolist()
            yield [DrawnRow(unit=unit, row=row, slot=place) for place, (unit, row) in enumerate(told) if row >= 0]
