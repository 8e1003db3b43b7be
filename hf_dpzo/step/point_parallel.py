"""Probe points that are spread over processes: all see the same batch, and each evaluates it at some of the points.

What is sent has the same shape in each step, for how many rows a batch has is secret, and a backend may print shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hf_dpzo.distributed.processes import Processes


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
