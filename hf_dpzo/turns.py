"""Probe points that are spread over processes: all see the same batch, and each evaluates it at some of the points.

What is sent has the same shape in each step, for how many rows a batch has is secret, and a backend may print shapes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Sampler

from hf_dpzo.processes import Processes
from hf_dpzo.sampling import Drawn, PoissonBatchSampler
from hf_dpzo.units import Units


def room_for(expected_batch_size: int, *, max_rows: int = 1) -> int:
    """Return how many rows there is room for in a batch, a public number that no Poisson batch exceeds in practice.

    A batch of more than twelve standard deviations and forty units above its mean has a probability below 1e-17. Its
    last rows would be left out.

    Args:
        expected_batch_size: units in a batch, on average.
        max_rows: of a unit.

    >>> room_for(64), room_for(64, max_rows=2)
    (200, 400)
    """
    return math.ceil(expected_batch_size + 12 * math.sqrt(expected_batch_size) + 40) * max_rows


def poisson_batches(
    units: Units, sampling_rate: float, processes: Processes, *, room: int | None
) -> Sampler[list[Drawn]]:
    """Return this process' batches: of its share of the units, or where there is `room` for them, the same in each."""
    if room is None:
        return PoissonBatchSampler(
            units=units, sampling_rate=sampling_rate, rank=processes.rank, processes=processes.size
        )
    return SameBatches(PoissonBatchSampler(units=units, sampling_rate=sampling_rate), processes, room=room)


class SameBatches(Sampler[list[Drawn]]):
    """The batches that the first process draws, in all processes.

    Args:
        sampler: draws them, from all units; the others do not use theirs.
        processes: of the run.
        room: for how many rows.
    """

    def __init__(self, sampler: Sampler[list[Drawn]], processes: Processes, *, room: int) -> None:
        self._sampler, self._processes, self._room = sampler, processes, room

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Drawn]]:
        batches = iter(self._sampler) if self._processes.first else iter(())
        for _ in range(len(self)):
            table = np.full((self._room, 2), -1, dtype=np.int64)
            for one in next(batches, [])[: self._room]:
                table[one.place] = one.unit, one.row
            told = self._processes.told(table).tolist()
            yield [Drawn(unit=unit, row=row, place=place) for place, (unit, row) in enumerate(told) if row >= 0]


@dataclass(kw_only=True)
class Turns:
    """Evaluates a batch where it is this process' turn. SENSITIVE.

    Every process walks through all points, since that is what leaves the weights at the same bits in each. Losses are
    put where their rows were drawn, for a process may fail on a row that others have.

    Args:
        processes: which take turns.
        losses: evaluates the rows that this process has, where the parameters are, float32 `[rows]`.
        places: of these rows among those that were drawn.
        room: for how many rows.
    """

    processes: Processes
    losses: Callable[[], torch.Tensor]
    places: Sequence[int]
    room: int
    _taken: int = field(default=0, init=False)

    def __call__(self) -> torch.Tensor:
        """The losses at the next point, float64 `[room]`, NaN where there is no row; zeros at another process' turn."""
        mine = self._taken % self.processes.size == self.processes.rank
        self._taken += 1
        if not mine:
            return torch.zeros(self.room, dtype=torch.float64)
        found = torch.full((self.room,), torch.nan, dtype=torch.float64)
        found[list(self.places)] = self.losses().double().cpu()
        return found

    def gathered(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the losses at all points, float64 `[rows, points]`; in all processes but the first one of no row.

        A number plus zeros is itself, to the last bit, and not finite where a loss was not.
        """
        total = self.processes.sum(losses.numpy())
        return losses[:0] if total is None else torch.from_numpy(total)[list(self.places)]
