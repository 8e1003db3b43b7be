"""Probe points spread over processes: all have the same batch, and each evaluates it at some of the points.

What processes send has the same shape in every step. The number of rows in a batch is secret, and a backend may print
shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.step.estimate import StepEstimate
from hf_dpzo.zo.spsa import FiniteDifference
from hf_dpzo.zo.walk import Stop


@dataclass(frozen=True, kw_only=True)
class PointParallelEstimate(StepEstimate):
    """Evaluates a batch at this process' share of the stops. SENSITIVE.

    Every process makes the whole walk, so the weights end at the same bits in each. Losses are placed by the slots of
    their rows, because a process may fail on a row on which others succeed.

    Args:
        losses: the losses of a logical batch, at the point where the parameters are.
        processes: the run's processes.
        capacity: the number of slots, which is the number of rows that a batch has room for.
    """

    processes: Processes
    capacity: int

    def evaluate(self, stop: Stop, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """Return the losses, float64 `[rows, 1]`: zeros at another process' stop."""
        if not self._is_own(stop.index):
            return torch.zeros((len(batch.row_slots), 1), dtype=torch.float64)
        return super().evaluate(stop, model, batch).cpu()

    def coefficients(
        self, losses: Sequence[torch.Tensor], batch: LogicalBatch, estimator: FiniteDifference
    ) -> torch.Tensor:
        """Return the coefficients of all units in the first process, and of none in the others.

        The sum over processes adds zeros to each loss, which keeps it to the last bit, and keeps NaN.
        """
        # A slot without a row has NaN at own stops.
        table = torch.tensor([[torch.nan if self._is_own(stop) else 0.0 for stop in range(len(losses))]])
        table = table.double().repeat(self.capacity, 1)
        table[list(batch.row_slots)] = torch.cat(losses, dim=1)
        total = self.processes.reduce_sum(table.numpy())
        if total is None:
            return torch.zeros((0, estimator.num_directions), dtype=torch.float64)
        return super().coefficients([torch.from_numpy(total)[list(batch.row_slots)]], batch, estimator)

    def _is_own(self, stop: int) -> bool:
        """Return whether this process evaluates the stop of this number."""
        return stop % self.processes.size == self.processes.rank
