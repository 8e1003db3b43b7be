"""The public half of a step: everything that moves parameters, none of which looks at data.

Training and replay both go through here. What training adds is losses, and the door that they leave by.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from hf_dpzo.methods.method import Method, Stage
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk, Walk, stacked


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

    def differences(
        self,
        step: int,
        losses: Callable[[], torch.Tensor],
        gathered: Callable[[torch.Tensor], torch.Tensor] = lambda found: found,
    ) -> torch.Tensor:
        """Walk through the probe points of `step`, in its stage. SENSITIVE where `losses` are.

        Parameters of which no copy is made stay at the last point: the optimizer goes on from there.

        Args:
            step: the step, from 0.
            losses: evaluates the batch where the parameters are, float32 `[batch]`. In a replay, of no rows.
            gathered: brings losses together that several processes have evaluated.
        """
        estimator = replace(self.method.estimator, smoothing=self.begin(step).smoothing)
        walk, self.optimizer.aside = self._walk(step), True
        found = estimator.differences(walk=walk, losses=losses, gathered=gathered)
        self.optimizer.aside = isinstance(walk, AddingWalk)
        return found

    def differences_together(
        self, step: int, losses: Callable[[Sequence[torch.Tensor]], torch.Tensor], *, points_per_pass: int
    ) -> torch.Tensor:
        """As `differences`, with several probe points in one pass. A replay can not tell: no parameter moves.

        Args:
            step: the step, from 0.
            losses: evaluates the batch at stacked values of the trained parameters, float32 `[batch, points]`.
            points_per_pass: how many points there are in a stack, at most.
        """
        estimator = replace(self.method.estimator, smoothing=self.begin(step).smoothing)
        parameters, directions = self.optimizer.parameters(), self.optimizer.directions
        return estimator.differences_together(
            lambda points: losses(stacked(parameters, directions, step=step, points=points)),
            points_per_pass=min(points_per_pass, len(estimator.points)),
        )

    def retrace(self, step: int) -> None:
        """Walk as `step` did, without data."""
        self.differences(step, lambda: torch.zeros(0))

    @property
    def mask_fingerprint(self) -> int:
        """Which coordinates may move, in this stage; 0 where all may."""
        mask = self.optimizer.directions.mask
        return 0 if mask is None else mask.fingerprint

    def _mask(self, stage: int) -> Mask | None:
        pruning = self.method.pruning(stage)
        if pruning is None:
            return self.optimizer.directions.mask
        return pruning.mask(
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

    def _walk(self, step: int) -> Walk:
        parameters, directions = self.optimizer.parameters(), self.optimizer.directions
        if is_copied(self.model, parameters):
            return CopyingWalk(parameters, directions, step=step)
        return AddingWalk(parameters, directions, step=step, stay=self.optimizer.stay)


def is_copied(model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> bool:
    """Whether what is trained is a small enough share of `model` to be restored from a copy."""
    return sum(p.numel() for p in trained) <= COPIED_SHARE * sum(p.numel() for p in model.parameters())
