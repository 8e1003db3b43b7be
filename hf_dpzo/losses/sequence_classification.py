"""The loss of a head that classifies a row, or predicts numbers for it."""

import torch
import torch.nn.functional as F

from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss, class_losses
from hf_dpzo.models.unwrap import Inputs, unwrap_model


class SequenceClassificationLoss(ScoreLoss):
    """The loss of a head that classifies texts, images, videos or sounds, or predicts numbers for them.

    The kind of the problem is what transformers takes it for: the configuration's `problem_type`, and else regression
    for a single output, classes for labels of integers, and several labels for labels of floats. Transformers then
    writes it into the configuration, so that the first labels decide for all; here nothing is written.

    - `regression`: the squared error, or the mean of those of several targets;
    - `single_label_classification`: the cross-entropy;
    - `multi_label_classification`: the mean of the labels' binary cross-entropies.

    Args:
        model: a model with a classification head. Its configuration says the number and the kind of the labels.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)
        self._config = unwrap_model(model).config

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits, float32 `[batch, labels]`."""
        return self._forward(model, inputs)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        labels = inputs["labels"]
        problem = self.find_problem_type(labels)
        if problem == "single_label_classification":
            return class_losses(scores, labels.reshape(len(scores)))
        targets = labels.reshape(scores.shape).float()
        if problem == "regression":
            return F.mse_loss(scores, targets, reduction="none").mean(dim=-1)
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(dim=-1)

    def find_problem_type(self, labels: torch.Tensor) -> str:
        """Return the kind of the problem: that of the configuration, or else that of the `labels`."""
        return self._config.problem_type or _find_problem_type(labels, self._config.num_labels)


def _find_problem_type(labels: torch.Tensor, num_labels: int) -> str:
    """Return the kind of the problem that transformers takes `labels` for; integers for each label are several labels.

    >>> _find_problem_type(torch.tensor([0, 2]), 3), _find_problem_type(torch.tensor([[1.0, 0.0]]), 2)
    ('single_label_classification', 'multi_label_classification')
    """
    if num_labels == 1:
        return "regression"
    is_class = not labels.is_floating_point() and labels.shape[1:].numel() == 1
    return "single_label_classification" if is_class else "multi_label_classification"
