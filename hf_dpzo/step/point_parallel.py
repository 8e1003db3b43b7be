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
        """Return the losses, float64 `[capacity, 1]`: NaN in a slot without a row, zeros at another process' stop."""
        if stop.index % self.processes.size != self.processes.rank:
            return torch.zeros((self.capacity, 1), dtype=torch.float64)
        losses = torch.full((self.capacity, 1), torch.nan, dtype=torch.float64)
        losses[list(batch.row_slots)] = super().evaluate(stop, model, batch).cpu()
        return losses

    def coefficients(
        self, losses: Sequence[torch.Tensor], batch: LogicalBatch, estimator: FiniteDifference
    ) -> torch.Tensor:
        """Return the coefficients of all units in the first process, and of none in the others.

        The sum over processes adds zeros to each loss, which keeps it to the last bit, and keeps NaN.
        """
        total = self.processes.reduce_sum(torch.cat(losses, dim=1).numpy())
        if total is None:
            return torch.zeros((0, estimator.num_directions), dtype=torch.float64)
        return super().coefficients([torch.from_numpy(total)[list(batch.row_slots)]], batch, estimator)
