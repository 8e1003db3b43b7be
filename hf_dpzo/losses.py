"""One loss for each example, in float32, for each kind of head.

A loss that is reduced over the batch has no sensitivity to clip. So none of these ever asks the model for its own loss:
they take its outputs, and reduce within each row by itself.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_dpzo.collation import LogicalBatch, LogicalBatchCollator, MicroBatch
from hf_dpzo.output_layer import NO_TARGET, Inputs, OutputLayer, class_name, unwrapped
from hf_dpzo.sampling import Fetched
from hf_dpzo.sealed import WithheldError, drawing_nothing, sealed


class PerExampleLoss(ABC):
    """One loss for each row of a micro-batch; row i's depends on row i alone."""

    @abstractmethod
    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """What predictions are made from, `[batch, ...]`."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses, float32 `[batch]`, and the scores."""

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The losses alone."""
        return self.evaluate(model, inputs)[0]


class ScoreLoss(PerExampleLoss):
    """A loss that is computed from the scores."""

    @abstractmethod
    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row, float32 `[batch]`."""

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses `[batch]`, and the scores that they come from."""
        scores = self.scores(model, inputs)
        return self.losses(scores, inputs), scores


class Forward:
    """Calls a model without labels, and with positions that do not depend on how far a row was padded.

    With labels, a model would compute its own loss over the batch. Without positions, a decoder counts left padding as
    tokens, and a long row would move the losses of the short rows beside it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        base = unwrapped(model)
        # Prompt tuning computes positions of its own.
        self._positions = is_decoder(base) and accepts(base, "position_ids") and not is_prompt_tuned(model)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The logits, float32."""
        given = without_labels(inputs)
        if self._positions and "attention_mask" in given and "position_ids" not in given:
            given["position_ids"] = (given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return model(**given).logits.float()


def class_losses(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row, `[batch]`; NaN for a label that is no class, which on a GPU would end the process.

    >>> class_losses(torch.zeros(2, 2), torch.tensor([1, 7])).isnan().tolist()
    [False, True]
    """
    known = (labels >= 0) & (labels < scores.shape[-1])
    losses = F.cross_entropy(scores, torch.where(known, labels, 0), reduction="none")
    return torch.where(known, losses, torch.nan)


class SequenceClassificationLoss(ScoreLoss):
    """Cross-entropy of a classification head; squared error for one output; binary cross-entropy for many labels."""

    def __init__(self, model: torch.nn.Module) -> None:
        config = unwrapped(model).config
        self._forward = Forward(model)
        self._num_labels, self._multi_label = config.num_labels, config.problem_type == "multi_label_classification"

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Logits `[batch, labels]`."""
        return self._forward(model, inputs)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row."""
        labels = inputs["labels"]
        if self._num_labels == 1:
            return F.mse_loss(scores.squeeze(-1), labels.float(), reduction="none")
        if self._multi_label:
            return F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none").mean(dim=-1)
        return class_losses(scores, labels)


class CausalLMLoss(ScoreLoss):
    """Mean cross-entropy of a row's own target tokens, those whose label is not -100. A row without any scores zero.

    Called for the losses alone, it has logits made at a row's own targets only, and of one row at a time, wherever the
    architecture allows it. Scores are all logits. A subclass with other `losses` of them needs another `__call__`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = Forward(model)
        self._output_layer = OutputLayer(self._forward)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The losses alone, float32 `[batch]`."""
        if self._output_layer.fits(model):
            return self._output_layer.target_losses(model, inputs, self._targets(inputs))
        return super().__call__(model, inputs)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Next-token logits `[batch, tokens, vocabulary]`."""
        # Prompt tuning puts virtual tokens in front, which have no labels.
        return self._forward(model, inputs)[:, -inputs["input_ids"].shape[1] :]

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row."""
        targets = self._targets(inputs)
        tokens = F.cross_entropy(scores[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=NO_TARGET)
        return tokens.sum(dim=1) / (targets != NO_TARGET).sum(dim=1).clamp(min=1)

    def _targets(self, inputs: Inputs) -> torch.Tensor:
        """What follows each token but the last, `[batch, tokens - 1]`; -100 for nothing."""
        targets = inputs["labels"][:, 1:]
        if "attention_mask" in inputs:  # Nothing is predicted from padding, of which a row has what its batch needs.
            targets = targets.masked_fill(inputs["attention_mask"][:, :-1] == 0, NO_TARGET)
        return targets


class FunctionLoss(PerExampleLoss):
    """Any `fn(model, inputs) -> [batch]`, differentiable or not. Predictions are the model's logits."""

    def __init__(self, fn: Callable[[torch.nn.Module, Inputs], torch.Tensor]) -> None:
        self.fn = fn

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The model's logits."""
        return model(**without_labels(inputs)).logits

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """One loss for each row, `[batch]`."""
        return self.fn(model, inputs)

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses `[batch]`, and the model's logits."""
        return self.fn(model, inputs), self.scores(model, inputs)


def as_loss(loss: PerExampleLoss | Callable[..., torch.Tensor] | None, model: torch.nn.Module) -> PerExampleLoss:
    """Return `loss`, a function wrapped, or where there is none the loss of the model's head."""
    if loss is None:
        return loss_of_head(model)
    return loss if isinstance(loss, PerExampleLoss) else FunctionLoss(loss)


@dataclass(frozen=True, kw_only=True)
class BatchLosses:
    """Evaluates a logical batch, wherever the parameters are. SENSITIVE.

    Args:
        loss: of a micro-batch.
        collator: made the micro-batches, and can take one apart.
        prepare: moves inputs to where the model is.
        device: where an empty batch's losses are.
        tail: the shape of what the loss returns for each row: nothing, or a number of probe points.
    """

    loss: PerExampleLoss
    collator: LogicalBatchCollator
    prepare: Callable[[Any], Any]
    device: torch.device
    tail: tuple[int, ...] = ()

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """One loss for each row, float32 `[rows]`; NaN for those whose loss could not be computed."""
        waiting, losses = deque(batch.micro_batches), [torch.empty((0, *self.tail), device=self.device)]
        while waiting:
            losses += self._of_next(model, waiting)
        return torch.cat(losses)

    @torch.no_grad()
    def of_public(self, model: torch.nn.Module, rows: Sequence[Any]) -> torch.Tensor:
        """The losses of public `rows`, in their order, made as those of private ones are; but errors are shown."""
        numbered = [Fetched(unit=unit, row=row, place=unit) for unit, row in enumerate(rows)]
        batch = self.collator(numbered)["batch"]
        losses = torch.full((len(rows), *self.tail), torch.nan, device=self.device)
        for micro_batch in batch.micro_batches:
            if micro_batch.inputs is None:
                self.collator.show([rows[row.unit] for row in micro_batch.rows])
            units = [row.unit for row in micro_batch.rows]
            evaluated = drawing_nothing("per_example_loss", functools.partial(self._checked, model, micro_batch))
            losses[units] = evaluated[: len(units)].float()
        return losses

    def _of_next(self, model: torch.nn.Module, waiting: deque[MicroBatch]) -> list[torch.Tensor]:
        """The losses of the first that waits; NaN for a row that fails alone. Several that fail wait one by one."""
        micro_batch = waiting.popleft()
        try:
            return [self._evaluated(model, micro_batch)]
        except WithheldError:
            if len(micro_batch.rows) == 1:
                return [torch.full((1, *self.tail), torch.nan, device=self.device)]
            waiting.extendleft(reversed(self.collator.apart(micro_batch)))
            return []

    def _evaluated(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        losses = sealed("per_example_loss", lambda: self._checked(model, micro_batch))
        return losses[: len(micro_batch.rows)].float()

    def _checked(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        losses = self.loss(model, self.prepare(micro_batch.inputs))
        if not isinstance(losses, torch.Tensor) or losses.shape != (micro_batch.size, *self.tail):
            raise ValueError("per_example_loss: it must return one loss for each row, shape [batch].")
        return losses


def loss_of_head(model: torch.nn.Module) -> PerExampleLoss:
    """Return the per-example loss that belongs to the head of `model`, or raise if it is not known."""
    base = unwrapped(model)
    name = class_name(base)
    if name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return SequenceClassificationLoss(model)
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return CausalLMLoss(model)
    raise ValueError(
        f"model={name}: no per-example loss is known for this head; pass per_example_loss, a function "
        "(model, inputs) that returns one loss for each row, shape [batch]."
    )


def without_labels(inputs: Inputs) -> dict[str, Any]:
    """What a model is given: with labels, it would compute a loss of its own."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def is_prompt_tuned(model: torch.nn.Module) -> bool:
    """Whether what is trained are virtual tokens in front of a row's own."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model's forward takes `argument`."""
    return isinstance(model, PreTrainedModel) and argument in inspect.signature(model.forward).parameters


def is_decoder(model: torch.nn.Module) -> bool:
    """Whether the model is a causal one, whose positions count from its first token."""
    kind = model.config.model_type if isinstance(model, PreTrainedModel) else None
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in causal and kind not in masked
