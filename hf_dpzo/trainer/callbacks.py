"""Stops a run that trains nothing because losses ignore the parameters, or updates never reach them.

Both checks use public values alone. Whether the losses respond is tried on public rows, before any data are touched.
Whether the parameters move follows from what was released.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_dpzo.models.unwrap import find_adapter_parameters, unwrap_optimizer
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.shift import shifted


# The number of coordinates of each parameter that are compared: enough to notice a move, too few to cost memory.
SAMPLE = 1024


class FirstStepGuard(TrainerCallback):
    """Stops a run whose first step does nothing.

    Args:
        smoothing: the distance from the parameters to a probe point.
        begin_stage: a function that builds what the first stage needs, such as a mask, and raises where it cannot.
        fingerprint_responses: a function that returns checksums of the outputs and the losses for public rows,
            computed as training computes them; none if there are no such rows.
    """

    def __init__(
        self, *, smoothing: float, begin_stage: Callable[[], object], fingerprint_responses: Callable[[], list[int]]
    ) -> None:
        self._smoothing = smoothing
        self._begin_stage = begin_stage
        self._fingerprint_responses = fingerprint_responses
        self._before: list[torch.Tensor] | None = None
        self._done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise `RuntimeError`, before the first batch, unless the model's outputs differ between the probe points."""
        kwargs["model"].eval()
        self._begin_stage()
        if not self._is_responsive(unwrap_optimizer(kwargs["optimizer"])):
            raise RuntimeError(
                f"smoothing={self._smoothing:g}: the model's outputs are the same at both probe points; check that "
                "the trainable parameters take part in the forward pass, or raise smoothing."
            )
        self._refuse_idle_adapter(kwargs["model"], unwrap_optimizer(kwargs["optimizer"]))

    def _refuse_idle_adapter(self, model: torch.nn.Module, optimizer: ZOOptimizer) -> None:
        """Raise `RuntimeError` if only the head beside an adapter answers, wherever the adapter's parameters are."""
        parameters = optimizer.parameters()
        added = find_adapter_parameters(model)
        adapter = [index for index, parameter in enumerate(parameters) if parameter in added]
        if 0 < len(adapter) < len(parameters) and not self._answers(optimizer, adapter):
            raise RuntimeError(
                f"smoothing={self._smoothing:g}: the model's outputs are the same at both probe points of its adapter, "
                "so that the head beside it would be trained alone; choose an adapter that takes part in the forward "
                "pass of this kind of model, or train the head without one."
            )

    def _is_responsive(self, optimizer: ZOOptimizer) -> bool:
        """Return whether perturbing any parameter changes the responses. The smallest are tried first."""
        sizes = [parameter.numel() for parameter in optimizer.parameters()]
        return any(self._answers(optimizer, [index]) for index in sorted(range(len(sizes)), key=sizes.__getitem__))

    def _answers(self, optimizer: ZOOptimizer, indices: Sequence[int]) -> bool:
        """Return whether the responses differ between both sides of some parameters, or there are none to compare."""
        parameters = optimizer.parameters()
        moved = {index: parameters[index] for index in indices}
        responses = []
        for distance in (+self._smoothing, -self._smoothing):
            with shifted(moved, optimizer.directions, {0: distance}):
                responses.append(self._fingerprint_responses())
        return not all(responses) or responses[0] != responses[1]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep a sample of each parameter from before the first update that should move any."""
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
        """Raise `RuntimeError` unless that update moved a parameter."""
        if self._before is None:
            return
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        moved = any(
            not torch.equal(old, new) for old, new in zip(self._before, _sample_parameters(optimizer), strict=True)
        )
        self._before = None
        self._done = True
        if not moved:
            raise RuntimeError(
                f"learning_rate={optimizer.param_groups[0]['lr']:g}: the first update moved no parameter; raise it, or "
                "check that the optimizer holds the model's own parameters."
            )


def _sample_parameters(optimizer: ZOOptimizer) -> list[torch.Tensor]:
    mask = optimizer.directions.mask
    sample = []
    for index, parameter in enumerate(optimizer.parameters()):
        first = torch.arange(min(SAMPLE, parameter.numel()))
        movable = first if mask is None else mask.coordinates(index, limit=SAMPLE)
        sample.append(optimizer.read_settled(index, movable.to(parameter.device)))
    return sample
