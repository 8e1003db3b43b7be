"""The secret half of a step: the losses of its batch, and the coefficients computed from them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.data.units import average_by_unit
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.batched_points import at_stacks
from hf_dpzo.zo.spsa import FiniteDifference
from hf_dpzo.zo.walk import Stop, Walk


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Evaluates a batch at each stop of a walk, and compares the losses. SENSITIVE.

    Args:
        losses: the losses of a logical batch, at the point where the parameters are.
    """

    losses: BatchLosses

    def evaluate(self, stop: Stop, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """Return the losses at the points of `stop`, float64 `[rows, points]`."""
        losses = at_stacks(self.losses, model, stop.stacks) if stop.stacks else self.losses
        return losses(model, batch).double().reshape(-1, len(stop.points))

    def divide(self, batch: LogicalBatch, walk: Walk) -> list[LogicalBatch]:
        """Return the parts of `batch` with each of which a walk is made, in their order.

        Where stops share work, it is kept for one micro-batch at a time, if the walk can be made again for the next.
        """
        if self.losses.shared is None or not walk.is_exact or not batch.micro_batches:
            return [batch]
        return [replace(batch, micro_batches=(micro_batch,)) for micro_batch in batch.micro_batches]

    def share_work(self, batch: LogicalBatch) -> AbstractContextManager[None]:
        """Return a context in which all stops share the work on `batch` that no probe point changes."""
        shared = self.losses.shared
        return nullcontext() if shared is None else shared.opened(batch.micro_batches)

    def coefficients(
        self, losses: Sequence[torch.Tensor], batch: LogicalBatch, estimator: FiniteDifference
    ) -> torch.Tensor:
        """Return the coefficients of each unit of privacy in this process' share of the batch, float64 `[units, K]`.

        Args:
            losses: the losses at all stops, in the order of the walk, each `[rows, points]`.
            batch: the batch to which the losses belong.
            estimator: the estimator that compares the losses of a row.
        """
        row_coefficients = estimator.coefficients(torch.cat(losses, dim=1)[:, : len(estimator.points)])
        return average_by_unit(row_coefficients, batch.row_units, batch.num_units)
