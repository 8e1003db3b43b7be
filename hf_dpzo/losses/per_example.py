"""One loss for each example, in float32, for each kind of head.

A loss that is reduced over the batch has no sensitivity to clip. So none of these ever asks the model for its own loss:
they take its outputs, and reduce within each row by itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.models.auto import modeling_auto

from hf_dpzo.losses.output_layer import IGNORE_INDEX, OutputLayer
from hf_dpzo.models.unwrap import (
    Inputs,
    accepts_argument,
    class_name,
    drop_labels,
    is_decoder,
    is_prompt_tuned,
    unwrap_model,
)


class PerExampleLoss(ABC):
    """One loss for each row of a micro-batch; row i's depends on row i alone.

    Subclass it for a head of your own, or pass a function, which becomes a `FunctionLoss`.
    """

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


class ForwardPass:
    """Calls a model without labels, and with positions that do not depend on how far a row was padded.

    With labels, a model would compute its own loss over the batch. Without positions, a decoder counts left padding as
    tokens, and a long row would move the losses of the short rows beside it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        base = unwrap_model(model)
        # Prompt tuning computes positions of its own.
        self._positions = is_decoder(base) and accepts_argument(base, "position_ids") and not is_prompt_tuned(model)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The logits, float32."""
        given = drop_labels(inputs)
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
    """Cross-entropy of a classification head; squared error for one output; binary cross-entropy for many labels.

    Args:
        model: with a classification head; its configuration says how many labels there are, and of which kind.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        config = unwrap_model(model).config
        self._forward = ForwardPass(model)
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

    Args:
        model: the causal language model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)
        self._output_layer = OutputLayer(self._forward)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The losses alone, float32 `[batch]`."""
        if self._output_layer.supports(model):
            return self._output_layer.compute_target_losses(model, inputs, self._targets(inputs))
        return super().__call__(model, inputs)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Next-token logits `[batch, tokens, vocabulary]`."""
        # Prompt tuning puts virtual tokens in front, which have no labels.
        return self._forward(model, inputs)[:, -inputs["input_ids"].shape[1] :]

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row."""
        targets = self._targets(inputs)
        tokens = F.cross_entropy(scores[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORE_INDEX)
        return tokens.sum(dim=1) / (targets != IGNORE_INDEX).sum(dim=1).clamp(min=1)

    def _targets(self, inputs: Inputs) -> torch.Tensor:
        """What follows each token but the last, `[batch, tokens - 1]`; -100 for nothing."""
        targets = inputs["labels"][:, 1:]
        if "attention_mask" in inputs:  # Nothing is predicted from padding, of which a row has what its batch needs.
            targets = targets.masked_fill(inputs["attention_mask"][:, :-1] == 0, IGNORE_INDEX)
        return targets


class FunctionLoss(PerExampleLoss):
    """Any `fn(model, inputs) -> [batch]`, differentiable or not. Predictions are the model's logits.

    Args:
        fn: the function; the loss of a row depends on that row alone.

    >>> loss = FunctionLoss(lambda model, inputs: model(inputs["x"]).square().sum(dim=1))
    >>> loss(torch.nn.Identity(), {"x": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
    tensor([25.,  1.])
    """

    def __init__(self, fn: Callable[[torch.nn.Module, Inputs], torch.Tensor]) -> None:
        self.fn = fn

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The model's logits."""
        return model(**drop_labels(inputs)).logits

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """One loss for each row, `[batch]`."""
        return self.fn(model, inputs)

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses `[batch]`, and the model's logits."""
        return self.fn(model, inputs), self.scores(model, inputs)


def as_loss(loss: PerExampleLoss | Callable[..., torch.Tensor] | None, model: torch.nn.Module) -> PerExampleLoss:
    """Return `loss`, a function wrapped, or where there is none the loss of the model's head."""
    if loss is None:
        return build_head_loss(model)
    return loss if isinstance(loss, PerExampleLoss) else FunctionLoss(loss)


def build_head_loss(model: torch.nn.Module) -> PerExampleLoss:
    """Return the per-example loss that belongs to the head of `model`, or raise if it is not known."""
    base = unwrap_model(model)
    name = class_name(base)
    if name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return SequenceClassificationLoss(model)
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return CausalLMLoss(model)
    raise ValueError(
        f"model={name}: no per-example loss is known for this head; pass per_example_loss, a function "
        "(model, inputs) that returns one loss for each row, shape [batch]."
    )
