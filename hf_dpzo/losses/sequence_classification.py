"""The loss of a sequence classification head."""

import torch
import torch.nn.functional as F

from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss, class_losses
from hf_dpzo.models.unwrap import Inputs, unwrap_model


class SequenceClassificationLoss(ScoreLoss):
    """The loss of a classification head.

    It is the cross-entropy of the classes. For a single output it is the squared error, and for a row with several
    labels the mean of their binary cross-entropies.

    Args:
        model: a model with a classification head. Its configuration says the number and the kind of the labels.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        config = unwrap_model(model).config
        self._forward = ForwardPass(model)
        self._num_labels = config.num_labels
        self._is_multi_label = config.problem_type == "multi_label_classification"

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits, float32 `[batch, labels]`."""
        return self._forward(model, inputs)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        labels = inputs["labels"]
        if self._num_labels == 1:
            return F.mse_loss(scores.squeeze(-1), labels.float(), reduction="none")
        if self._is_multi_label:
            return F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none").mean(dim=-1)
        return class_losses(scores, labels)
