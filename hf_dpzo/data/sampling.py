"""Poisson batches: each unit joins each batch independently and secretly.

The number of rows in a batch is itself secret. Nothing here counts, logs or keeps it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from hf_dpzo.data.sealed import WithheldError, sealed
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.privacy.noise import BernoulliMask


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The number of a row that was drawn, that of its unit among those of its batch, and its place in the batch."""

    unit: int
    row: int
    place: int


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A row that was drawn; `None` for one that could not be fetched."""

    unit: int
    row: Any
    place: int


class PoissonBatchSampler(Sampler[list[Drawn]]):
    """Yields the rows of batches, some of them empty. Two passes never agree: there is no seed.

    Each unit belongs to one process, which draws by itself whether it joins. So what all processes draw is one Poisson
    batch, and none of them knows it.

    Args:
        units: whose rows they are.
        sampling_rate: the probability with which each unit joins a batch.
        rank: of this process.
        processes: how many there are.

    >>> sampler = PoissonBatchSampler(units=Units(num_rows=4), sampling_rate=0.5)
    >>> len(sampler), len(list(sampler))
    (2, 2)
    """

    def __init__(self, *, units: Units, sampling_rate: float, rank: int = 0, processes: int = 1) -> None:
        self._units, self._share = units, range(rank, len(units), processes)
        self._mask = BernoulliMask(size=len(self._share), rate=sampling_rate)

    def __len__(self) -> int:
        """Batches per epoch: as many as use each unit once on average."""
        return steps_per_epoch(self._mask.rate)

    def __iter__(self) -> Iterator[list[Drawn]]:
        for _ in range(len(self)):
            units = [self._share[place] for place in np.flatnonzero(self._mask.draw())]
            rows = [(i, row) for i, unit in enumerate(units) for row in self._units.rows_of(unit)]
            yield [Drawn(unit=i, row=row, place=place) for place, (i, row) in enumerate(rows)]


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
        without: a column that only says whose a row is.
    """

    def __init__(self, dataset: Dataset, *, without: str | None = None) -> None:
        self._dataset, self._without = dataset, without

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, drawn: list[Drawn]) -> list[Fetched]:
        """The rows that were drawn: what a dataloader asks for a batch with."""
        try:
            return sealed("train_dataset", lambda: [self._fetched(one) for one in drawn])
        except WithheldError:
            return [self._alone(one) for one in drawn]

    def _alone(self, one: Drawn) -> Fetched:
        try:
            return sealed("train_dataset", lambda: self._fetched(one))
        except WithheldError:
            return Fetched(unit=one.unit, row=None, place=one.place)

    def _fetched(self, one: Drawn) -> Fetched:
        row = self._dataset[one.row]
        if isinstance(row, Mapping):  # Such as what a tokenizer returns.
            row = {name: value for name, value in row.items() if name != self._without}
        return Fetched(unit=one.unit, row=row, place=one.place)


def batch_capacity(expected_batch_size: int, *, max_rows: int = 1) -> int:
    """Return how many rows a batch has room for, a public number that no Poisson batch exceeds in practice.

    A batch of more than twelve standard deviations and forty units above its mean has a probability below 1e-17. Its
    last rows would be left out.

    Args:
        expected_batch_size: units in a batch, on average.
        max_rows: of a unit.

    >>> batch_capacity(64), batch_capacity(64, max_rows=2)
    (200, 400)
    """
    return math.ceil(expected_batch_size + 12 * math.sqrt(expected_batch_size) + 40) * max_rows


def poisson_batches(
    units: Units, sampling_rate: float, processes: Processes, *, capacity: int | None
) -> Sampler[list[Drawn]]:
    """Return this process' batches: of its share of the units, or with a `capacity`, the same in each."""
    if capacity is None:
        return PoissonBatchSampler(
            units=units, sampling_rate=sampling_rate, rank=processes.rank, processes=processes.size
        )
    return SameBatches(PoissonBatchSampler(units=units, sampling_rate=sampling_rate), processes, capacity=capacity)


class SameBatches(Sampler[list[Drawn]]):
    """The batches that the first process draws, in all processes.

    Args:
        sampler: draws them, from all units; the others do not use theirs.
        processes: of the run.
        capacity: the number of rows that a batch has room for.
    """

    def __init__(self, sampler: Sampler[list[Drawn]], processes: Processes, *, capacity: int) -> None:
        self._sampler, self._processes, self._capacity = sampler, processes, capacity

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Drawn]]:
        batches = iter(self._sampler) if self._processes.first else iter(())
        for _ in range(len(self)):
            table = np.full((self._capacity, 2), -1, dtype=np.int64)
            for one in next(batches, [])[: self._capacity]:
                table[one.place] = one.unit, one.row
            told = self._processes.told(table).tolist()
            yield [Drawn(unit=unit, row=row, place=place) for place, (unit, row) in enumerate(told) if row >= 0]
