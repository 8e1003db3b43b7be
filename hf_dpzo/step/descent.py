"""The public half of a step: everything that moves parameters, none of which looks at data.

Training and replay both go through here. What training adds are losses at each stop of the walk, and the door that
they leave by.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from hf_dpzo.methods.method import Method, Stage
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.spsa import FiniteDifference
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk, StackingWalk, Walk


# Trainable sets up to this share of the model are restored from a copy, exactly; larger ones by walking back.
COPIED_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Moves the parameters of `optimizer` as `method` says.

    Args:
        model: what the parameters belong to.
        optimizer: it applies what was released.
        method: the parts and their parameters.
        planned_steps: how many steps the whole run has; stages depend on it.
    """

    model: torch.nn.Module
    optimizer: ZOOptimizer
    method: Method
    planned_steps: int

    def begin(self, step: int) -> Stage:
        """Begin the stage that `step` belongs to, unless it has begun, and return it."""
        stage = self.method.stage(step, self.planned_steps)
        if self.optimizer.stage != stage.number:
            mask = self._mask(stage.number)
            self.optimizer.begin_stage(number=stage.number, rate_factor=stage.rate_factor, mask=mask)
        return stage

    def walk(self, step: int, *, points_per_pass: int | None = None) -> AbstractContextManager[Walk]:
        """Return the walk through the probe points of `step`, in its stage, as a context.

        Parameters of which no copy is made stay at the last point: the optimizer goes on from there. A replay makes the
        same walk and looks at nothing.

        Args:
            step: the step, from 0.
            points_per_pass: the number of points that one forward pass evaluates, without moving a parameter; `None`
                for one, to which the parameters move.
        """
        given = {"step": step, "points": self.estimator(step).points}
        parameters, directions = self.optimizer.parameters(), self.optimizer.directions
        if points_per_pass is not None:
            walk = StackingWalk(parameters, directions, **given, points_per_stop=points_per_pass)
        elif is_copied(self.model, parameters):
            walk = CopyingWalk(parameters, directions, **given)
        else:
            walk = AddingWalk(parameters, directions, **given)
        return self.optimizer.follow(walk, step=step)

    def estimator(self, step: int) -> FiniteDifference:
        """Return what compares the losses of `step`, with the smoothing of its stage."""
        return replace(self.method.estimator, smoothing=self.begin(step).smoothing)

    @property
    def mask_fingerprint(self) -> int:
        """Which coordinates may move, in this stage; 0 where all may."""
        mask = self.optimizer.directions.mask
        return 0 if mask is None else mask.fingerprint

    def _mask(self, stage: int) -> Mask | None:
        pruning = self.method.pruning(stage)
        if pruning is None:
            return self.optimizer.directions.mask
        return pruning.compute_mask(
            self._outputs,
            list(self.model.parameters()),
            self.optimizer.parameters(),
            seed=self.optimizer.directions.seed,
            stage=stage,
        )

    def _outputs(self) -> torch.Tensor:
        """The model's first output for one made-up token."""
        device = next(self.model.parameters()).device
        try:
            return self.model(torch.ones((1, 1), dtype=torch.long, device=device))[0]
        except Exception as error:
            raise ValueError(
                f"pruning: the model can not be run on one token ({type(error).__name__}), which a mask is made from; "
                "use zoso, which needs none."
            ) from error


def is_copied(model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> bool:
    """Whether what is trained is a small enough share of `model` to be restored from a copy."""
    return sum(p.numel() for p in trained) <= COPIED_SHARE * sum(p.numel() for p in model.parameters())
