"""One loss for each example, in float32, for each kind of head.

A loss that is reduced over the batch has no sensitivity to clip. So none of these ever asks the model for its own loss:
they take its outputs, and reduce within each row by itself.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


Inputs = Mapping[str, Any]


class PerExampleLoss(ABC):
    """A loss in two halves, so that evaluation can use the first one by itself."""

    @abstractmethod
    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """What predictions are made from, `[batch, ...]`."""

    @abstractmethod
    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row, float32 `[batch]`; row i depends on row i alone."""

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Both halves: one loss for each row, `[batch]`."""
        return self.evaluate(model, inputs)[0]

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses `[batch]`, and the scores that they come from."""
        scores = self.scores(model, inputs)
        return self.losses(scores, inputs), scores


class SequenceClassificationLoss(PerExampleLoss):
    """Cross-entropy of a classification head; squared error for one output; binary cross-entropy for many labels."""

    def __init__(self, *, num_labels: int, multi_label: bool = False) -> None:
        self.num_labels, self.multi_label = num_labels, multi_label

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Logits `[batch, labels]`."""
        return model(**without_labels(inputs)).logits.float()

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row."""
        labels = inputs["labels"]
        if self.num_labels == 1:
            return F.mse_loss(scores.squeeze(-1), labels.float(), reduction="none")
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none").mean(dim=-1)
        return F.cross_entropy(scores, labels, reduction="none")


class CausalLMLoss(PerExampleLoss):
    """Mean cross-entropy of a row's own target tokens, those whose label is not -100. A row without any scores zero."""

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Next-token logits `[batch, tokens, vocabulary]`."""
        # Prompt tuning puts virtual tokens in front, which have no labels.
        return model(**without_labels(inputs)).logits[:, -inputs["input_ids"].shape[1] :].float()

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row."""
        targets = inputs["labels"][:, 1:]
        tokens = F.cross_entropy(scores[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return tokens.sum(dim=1) / (targets != -100).sum(dim=1).clamp(min=1)


class FunctionLoss(PerExampleLoss):
    """Any `fn(model, inputs) -> [batch]`, differentiable or not. Predictions are the model's logits."""

    def __init__(self, fn: Callable[[torch.nn.Module, Inputs], torch.Tensor]) -> None:
        self.fn = fn

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The model's logits."""
        return model(**without_labels(inputs)).logits

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Not available from scores: the function takes the model."""
        raise NotImplementedError("a loss given as a function is evaluated on the model: call it instead.")

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """One loss for each row, `[batch]`."""
        return self.fn(model, inputs)

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses `[batch]`, and the model's logits."""
        return self.fn(model, inputs), self.scores(model, inputs)


def loss_of_head(model: torch.nn.Module) -> PerExampleLoss:
    """Return the per-example loss that belongs to the head of `model`, or raise if it is not known."""
    base = unwrapped(model)
    name = type(base).__name__
    if name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        multi_label = base.config.problem_type == "multi_label_classification"
        return SequenceClassificationLoss(num_labels=base.config.num_labels, multi_label=multi_label)
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return CausalLMLoss()
    raise ValueError(
        f"model={name}: no per-example loss is known for this head; pass per_example_loss, a function "
        "(model, inputs) that returns one loss for each row, shape [batch]."
    )


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model's forward takes `argument`."""
    base = unwrapped(model)
    return isinstance(base, PreTrainedModel) and argument in inspect.signature(base.forward).parameters


def without_labels(inputs: Inputs) -> dict[str, Any]:
    """What the model is given: with labels, it would compute its own batch-reduced loss."""
    return {name: value for name, value in inputs.items() if name != "labels"}
