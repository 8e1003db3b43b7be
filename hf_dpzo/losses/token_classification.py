"""The loss of a head that classifies each token."""

import torch

from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss, drop_padding, token_losses
from hf_dpzo.models.unwrap import Inputs


class TokenClassificationLoss(ScoreLoss):
    """The mean cross-entropy of a row's labelled tokens, which are those whose label is not -100.

    Padding has no label, whatever the collator puts there. A row without labels has the loss zero.

    Args:
        model: a model with a head for tokens.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits, float32 `[batch, tokens, classes]`."""
        logits = self._forward(model, inputs)
        # The virtual tokens of prompt tuning stand in front and have no labels.
        return logits[:, -inputs["input_ids"].shape[1] :] if "input_ids" in inputs else logits

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        return token_losses(scores, drop_padding(inputs["labels"], inputs))
