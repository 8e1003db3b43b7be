"""The loss of a head that chooses one of several texts."""

import torch

from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss, class_losses
from hf_dpzo.models.unwrap import Inputs


class MultipleChoiceLoss(ScoreLoss):
    """The cross-entropy of the right one of a row's choices.

    Args:
        model: a model with a head for multiple choice.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits, float32 `[batch, choices]`."""
        return self._forward(model, inputs)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        return class_losses(scores, inputs["labels"].reshape(len(scores)))
