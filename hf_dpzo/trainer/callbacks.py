"""Catches the run that trains nothing: losses that ignore the parameters, updates that never reach them.

Both checks look at public values alone. Whether the outputs respond is tried on made-up tokens, before any data are
touched; whether the parameters moved follows from what was released.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_dpzo.models.unwrap import unwrap_model, unwrap_optimizer
from hf_dpzo.zo.optimizer import ZOOptimizer


# Coordinates of each parameter that are compared: enough to notice, too few to cost memory.
SAMPLE = 1024


class FirstStepGuard(TrainerCallback):
    """Stops a run whose first step does nothing.

    Args:
        smoothing: the distance from the parameters to a probe point.
        begin_stage: makes what the first stage needs, such as a mask, and raises where it can not.
    """

    def __init__(self, *, smoothing: float, begin_stage: Callable[[], object]) -> None:
        self._smoothing, self._begin_stage = smoothing, begin_stage
        self._before: list[torch.Tensor] | None = None
        self._done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first batch: do the model's outputs differ between the probe points?"""
        model = kwargs["model"]
        model.eval()
        self._begin_stage()
        base = unwrap_model(model)
        reads_tokens = isinstance(base, PreTrainedModel) and base.main_input_name == "input_ids"
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if reads_tokens and not _outputs_respond(model, optimizer, self._smoothing):
            raise RuntimeError(
                f"smoothing={self._smoothing:g}: the model's outputs are the same at both probe points; check that "
                "the trainable parameters take part in the forward pass, or raise smoothing."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first update that should change anything: remember a sample of each parameter."""
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if (
            not self._done
            and any(optimizer.pending_coefficients)
            and any(group["lr"] for group in optimizer.param_groups)
        ):
            self._before = _sample_parameters(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After it: did any of them move?"""
        if self._before is None:
            return
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        moved = any(
            not torch.equal(old, new) for old, new in zip(self._before, _sample_parameters(optimizer), strict=True)
        )
        self._before, self._done = None, True
        if not moved:
            raise RuntimeError(
                f"learning_rate={optimizer.param_groups[0]['lr']:g}: the first update moved no parameter; raise it, or "
                "check that the optimizer holds the model's own parameters."
            )


@torch.no_grad()
def _outputs_respond(model: torch.nn.Module, optimizer: ZOOptimizer, smoothing: float) -> bool:
    """Perturb one parameter after the other, the smallest first, until the outputs on made-up tokens differ."""
    parameters = optimizer.parameters()
    base = unwrap_model(model)
    tokens = {name: value[:1].to(base.device) for name, value in base.dummy_inputs.items()}
    for index in sorted(range(len(parameters)), key=lambda i: parameters[i].numel()):
        parameter, copy = parameters[index], parameters[index].detach().clone()
        outputs = []
        for distance in (+smoothing, -smoothing):
            try:
                optimizer.directions.add_(parameter, index=index, step=0, weights={0: distance})
                outputs.append(model(**tokens)[0])
            finally:
                parameter.copy_(copy)
        if not torch.equal(*outputs):
            return True
    return False


def _sample_parameters(optimizer: ZOOptimizer) -> list[torch.Tensor]:
    mask, sample = optimizer.directions.mask, []
    for index, parameter in enumerate(optimizer.parameters()):
        first = torch.arange(min(SAMPLE, parameter.numel()))
        movable = first if mask is None else mask.coordinates(index, limit=SAMPLE)
        sample.append(optimizer.read_settled(index, movable.to(parameter.device)))
    return sample


class EpsilonProgressCallback(ProgressCallback):
    """The stock progress bar, which also shows the last logged epsilon."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As stock; and put epsilon on the bar."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs is not None and "epsilon" in logs:
            self.training_bar.set_postfix(epsilon=logs["epsilon"])
