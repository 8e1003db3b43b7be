"""How a step's probe points are evaluated: one after the other, several in a pass, or by several processes in turns."""

import functools
from dataclasses import dataclass

import torch

from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.data.units import unit_means
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.batched_points import together
from hf_dpzo.step.descent import Descent
from hf_dpzo.step.point_parallel import Turns


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Compares the losses of a batch between the probe points of a step. SENSITIVE.

    Args:
        losses: of a logical batch, where the parameters are.
        processes: of the run.
        room: for how many rows, where all processes have the same batch and share out the points; else `None`.
        points_per_pass: how many points one forward pass evaluates; `None` for one.
    """

    losses: BatchLosses
    processes: Processes
    room: int | None
    points_per_pass: int | None

    def __call__(self, descent: Descent, step: int, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """The coefficients of each unit of privacy in this process' share, float64 `[units, K]`."""
        found = self._of_rows(descent, step, model, batch)
        # Where processes take turns, the first one ends up with all rows, and the others with none.
        units, count = (batch.units, batch.num_units) if len(found) else ([], 0)
        return unit_means(found, units, count)

    def _of_rows(self, descent: Descent, step: int, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        losses = functools.partial(self.losses, model, batch)
        if self.room is not None:
            turns = Turns(processes=self.processes, losses=losses, places=batch.places, room=self.room)
            return descent.differences(step, turns, turns.gathered)
        if self.points_per_pass is None:
            return descent.differences(step, losses)
        return descent.differences_together(
            step,
            lambda stacks: together(self.losses, model, descent.optimizer.parameters(), stacks)(model, batch),
            points_per_pass=self.points_per_pass,
        )
