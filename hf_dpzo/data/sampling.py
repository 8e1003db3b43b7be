"""Poisson batches: each unit takes part in each batch independently and secretly.

The number of rows in a batch is itself secret. Nothing here logs or keeps it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.privacy.noise import BernoulliSampler, draw_keys


# The number of bits of a row's random key.
KEY_BITS = 63


@dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """A row that was drawn for a batch.

    Args:
        unit: the number of the row's unit among the batch's units, from 0.
        row: the row's number in the data set.
        slot: the row's place in the batch, from 0.
        key: a fresh random number below `2**KEY_BITS`, which says nothing about the row.
    """

    unit: int
    row: int
    slot: int
    key: int = 0


@dataclass(frozen=True, kw_only=True)
class FetchedRow:
    """A row that was drawn and fetched.

    Args:
        unit: the number of the row's unit among the batch's units, from 0.
        row: the row's content; `None` if it could not be fetched.
        slot: the row's place in the batch, from 0.
        key: the random number of the row that was drawn. Made-up rows need none.
    """

    unit: int
    row: Any
    slot: int
    key: int = 0


class PoissonBatchSampler(Sampler[list[DrawnRow]]):
    """Draws the rows of Poisson batches, some of which are empty. There is no seed, so no two passes are the same.

    Each unit belongs to one process, which alone draws whether the unit takes part. So all processes' rows together are
    one Poisson batch, and no process knows all of it.

    Args:
        units: the units of privacy of all processes.
        sampling_rate: the probability with which each unit takes part in a batch.
        own_units: the numbers of the units that belong to this process; by default all.

    >>> sampler = PoissonBatchSampler(units=Units(num_rows=4), sampling_rate=0.5)
    >>> len(sampler), len(list(sampler))
    (2, 2)
    """

    def __init__(self, *, units: Units, sampling_rate: float, own_units: Sequence[int] | None = None) -> None:
        self._units = units
        self._own_units = range(len(units)) if own_units is None else own_units
        self._sampler = BernoulliSampler(size=len(self._own_units), rate=sampling_rate)

    def __len__(self) -> int:
        """Return the number of batches per epoch, in which each unit is used once on average."""
        return steps_per_epoch(self._sampler.rate)

    def __iter__(self) -> Iterator[list[DrawnRow]]:
        return map(list_rows, self.draw_arrays())

    def draw_arrays(self) -> Iterator[np.ndarray]:
        """Yield the batches of `__iter__` as arrays `[rows, 3]`: the number of its unit, row and key of each row."""
        own_units = np.asarray(self._own_units, dtype=np.int64)
        for _ in range(len(self)):
            units = own_units[self._sampler.draw()]
            drawn = self._units.draw_rows_of(units)
            yield np.stack([*drawn, draw_keys(drawn.shape[1])], axis=1)

    @property
    def own_rows(self) -> np.ndarray:
        """The numbers of the rows that this sampler may draw, int64 `[rows]`."""
        return self._units.list_rows_of(self._own_units)


def list_rows(drawn: np.ndarray) -> list[DrawnRow]:
    """Return the rows of an array of units, rows and keys, `[rows, 3]`."""
    return [DrawnRow(unit=unit, row=row, slot=slot, key=key) for slot, (unit, row, key) in enumerate(drawn.tolist())]


def assign_units(num_units: int, processes: Processes) -> np.ndarray:
    """Return for each unit the rank of the process that it belongs to, drawn anew and at random; the same in each.

    If units took turns, one unit more would move all units behind it to other processes, and so to other micro-batches.
    """
    return processes.broadcast(draw_keys(num_units)) % processes.size


def steps_per_epoch(sampling_rate: float) -> int:
    """Return the number of Poisson batches that use each unit once on average.

    >>> steps_per_epoch(0.016)
    62
    """
    return max(1, round(1 / sampling_rate))


class SealedRows(Dataset):
    """Fetches the rows of a data set under seal. A row that cannot be fetched has no content.

    Args:
        dataset: the data set.
        dropped_column: a column to leave out, because it only says to which unit a row belongs.
    """

    def __init__(self, dataset: Dataset, *, dropped_column: str | None = None) -> None:
        self._dataset = dataset
        self._dropped_column = dropped_column

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, drawn: list[DrawnRow]) -> list[FetchedRow]:
        """Return the rows that were drawn. A dataloader fetches a batch by this method."""
        try:
            return run_sealed("train_dataset", lambda: [self._fetch(drawn_row) for drawn_row in drawn])
        except WithheldError:
            return [self._fetch_alone(drawn_row) for drawn_row in drawn]

    def _fetch_alone(self, drawn: DrawnRow) -> FetchedRow:
        try:
            return run_sealed("train_dataset", lambda: self._fetch(drawn))
        except WithheldError:
            return FetchedRow(unit=drawn.unit, row=None, slot=drawn.slot, key=drawn.key)

    def _fetch(self, drawn: DrawnRow) -> FetchedRow:
        row = self._dataset[drawn.row]
        if isinstance(row, Mapping):  # Not only a dict: a tokenizer's output is a mapping too.
            row = {name: value for name, value in row.items() if name != self._dropped_column}
        return FetchedRow(unit=drawn.unit, row=row, slot=drawn.slot, key=drawn.key)


def batch_capacity(expected_batch_size: int, *, max_rows_per_unit: int = 1) -> int:
    """Return the number of rows that a batch has room for, a public number that no Poisson batch exceeds in practice.

    A batch of more than forty units and twelve standard deviations above its mean has a probability below 1e-17. Its
    last rows would be left out.

    Args:
        expected_batch_size: the expected number of units in a batch.
        max_rows_per_unit: the largest number of rows that a unit brings to a batch.

    >>> batch_capacity(64), batch_capacity(64, max_rows_per_unit=2)
    (200, 400)
    """
    return math.ceil(expected_batch_size + 12 * math.sqrt(expected_batch_size) + 40) * max_rows_per_unit


def expected_drawn_rows(num_rows: int, *, sampling_rate: float, steps: int) -> float:
    """Return how many of `num_rows` are drawn at least once, on average.

    >>> round(expected_drawn_rows(1000, sampling_rate=0.01, steps=100))
    634
    """
    return num_rows * (1 - (1 - sampling_rate) ** steps)


def build_batch_sampler(
    units: Units, sampling_rate: float, processes: Processes, *, capacity: int | None
) -> "PoissonBatchSampler | BroadcastBatchSampler":
    """Return the sampler of this process' batches.

    It draws from this process' share of the units. With a `capacity`, it gives the same batches in all processes.
    """
    if capacity is None:
        own_units = np.flatnonzero(assign_units(len(units), processes) == processes.rank).tolist()
        return PoissonBatchSampler(units=units, sampling_rate=sampling_rate, own_units=own_units)
    return BroadcastBatchSampler(
        PoissonBatchSampler(units=units, sampling_rate=sampling_rate), processes, capacity=capacity
    )


class BroadcastBatchSampler(Sampler[list[DrawnRow]]):
    """Gives all processes the batches that the first process draws.

    Args:
        sampler: draws from all units. Only the first process uses it.
        processes: the run's processes.
        capacity: the number of rows that a batch has room for.
    """

    def __init__(self, sampler: PoissonBatchSampler, processes: Processes, *, capacity: int) -> None:
        self._sampler = sampler
        self._processes = processes
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[DrawnRow]]:
        return map(list_rows, self.draw_arrays())

    def draw_arrays(self) -> Iterator[np.ndarray]:
        """Yield the batches of `__iter__` as arrays `[rows, 3]`: the number of its unit, row and key of each row."""
        batches = self._sampler.draw_arrays() if self._processes.is_first else iter(())
        for _ in range(len(self)):
            table = np.full((self._capacity, 3), -1, dtype=np.int64)
            for drawn in islice(batches, 1):
                table[: len(drawn)] = drawn[: self._capacity]
            table = self._processes.broadcast(table)
            yield table[table[:, 1] >= 0]

    @property
    def own_rows(self) -> np.ndarray:
        """The numbers of the rows that this sampler may draw, int64 `[rows]`: all."""
        return self._sampler.own_rows
