"""The loss of a sequence classification head."""

import torch
import torch.nn.functional as F

from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss, class_losses
from hf_dpzo.models.unwrap import Inputs, unwrap_model


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
