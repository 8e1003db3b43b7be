"""Probe points that are spread over processes: all see the same batch, and each evaluates it at some of the points."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import Sampler

from hf_dpzo.processes import Processes
from hf_dpzo.sampling import Drawn


class SameBatches(Sampler[list[Drawn]]):
    """The batches that the first process draws, in all processes.

    Args:
        sampler: draws them, from all units; the others do not use theirs.
        processes: of the run.
    """

    def __init__(self, sampler: Sampler[list[Drawn]], processes: Processes) -> None:
        self._sampler, self._processes = sampler, processes

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Drawn]]:
        drawn = iter(self._sampler)
        for _ in range(len(self)):
            yield self._processes.by_first(lambda: next(drawn))


@dataclass(kw_only=True)
class Turns:
    """Evaluates a batch where it is this process' turn. SENSITIVE.

    Every process walks through all points, since that is what leaves the weights at the same bits in each.

    Args:
        processes: which take turns.
        losses: evaluates the batch where the parameters are, float32 `[batch]`.
        rows: how many rows the batch has.
        device: where losses are.
    """

    processes: Processes
    losses: Callable[[], torch.Tensor]
    rows: int
    device: torch.device
    _taken: int = field(default=0, init=False)

    def __call__(self) -> torch.Tensor:
        """The losses at the next point; zeros where it is another process' turn."""
        mine = self._taken % self.processes.size == self.processes.rank
        self._taken += 1
        return self.losses() if mine else torch.zeros(self.rows, device=self.device)

    def gathered(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the losses at all points, float64 `[batch, points]`; in all processes but the first one of no row.

        A number plus zeros is itself, to the last bit, and not finite where a loss was not.
        """
        total = self.processes.sum(losses.cpu().numpy())
        return losses[:0] if total is None else torch.from_numpy(total)
