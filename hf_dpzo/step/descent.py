"""The public half of a step: everything that moves parameters. None of it looks at data.

Training and replay share this code. Training adds the losses at each stop of the walk, and the door through which they
are released.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from hf_dpzo.methods.method import Method, Stage
from hf_dpzo.models.set_aside import find_set_aside
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.spsa import FiniteDifference
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk, StackingWalk, Walk


# Trained parameters up to this share of the model are restored from a copy, exactly; more of them by walking back.
COPIED_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Moves the parameters of `optimizer` as `method` says.

    Args:
        model: the model to which the parameters belong.
        optimizer: the optimizer that applies released coefficients.
        method: the method, which says what a step consists of.
        planned_steps: the number of steps of the whole run, on which stages depend.
    """

    model: torch.nn.Module
    optimizer: ZOOptimizer
    method: Method
    planned_steps: int

    def begin(self, step: int) -> Stage:
        """Return the stage of `step`, after beginning it if the step before was in another one."""
        stage = self.method.stage(step, self.planned_steps)
        if self.optimizer.stage != stage.number:
            mask = self._choose_mask(stage.number)
            self.optimizer.begin_stage(number=stage.number, rate_factor=stage.rate_factor, mask=mask)
        return stage

    def walk(self, step: int, *, points_per_pass: int | None = None) -> AbstractContextManager[Walk]:
        """Return the walk through the probe points of `step`, as a context manager.

        Parameters that are not copied stay at the last point, from which the optimizer moves on. A replay makes the
        same walk without evaluating anything.

        Args:
            step: the step, from 0.
            points_per_pass: the number of points that one forward pass evaluates, without moving a parameter; `None`
                for one point, to which the parameters move.
        """
        settings = {"step": step, "points": self.estimator(step).points}
        parameters = self.optimizer.parameters()
        directions = self.optimizer.directions
        if points_per_pass is not None:
            walk = StackingWalk(parameters, directions, **settings, points_per_stop=points_per_pass)
        elif is_copied(self.model, parameters):
            walk = CopyingWalk(parameters, directions, **settings)
        else:
            walk = AddingWalk(parameters, directions, **settings)
        return self.optimizer.follow(walk, step=step)

    def estimator(self, step: int) -> FiniteDifference:
        """Return the estimator that compares the losses of `step`, with the smoothing of its stage."""
        return replace(self.method.estimator, smoothing=self.begin(step).smoothing)

    @property
    def mask_fingerprint(self) -> int:
        """The fingerprint of the mask of the present stage; 0 if all coordinates may move."""
        mask = self.optimizer.directions.mask
        return 0 if mask is None else mask.fingerprint

    def _choose_mask(self, stage: int) -> Mask | None:
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
        """Return the model's first output for one made-up token."""
        device = next(self.model.parameters()).device
        try:
            return self.model(torch.ones((1, 1), dtype=torch.long, device=device))[0]
        except Exception as error:
            raise ValueError(
                f"pruning: the model can not be run on one token ({type(error).__name__}), which a mask is made from; "
                "use zoso, which needs none."
            ) from error


def is_copied(model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> bool:
    """Return whether the `trained` parameters are a small enough share of `model` to be restored from a copy."""
    if find_set_aside(model) is not None:  # Beside it, whatever is trained is small.
        return True
    return sum(p.numel() for p in trained) <= COPIED_SHARE * sum(p.numel() for p in model.parameters())
