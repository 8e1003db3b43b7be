"""The loss of a masked language model."""

import torch

from hf_dpzo.losses.output_layer import OutputLayer
from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss, drop_padding, token_losses
from hf_dpzo.models.unwrap import Inputs


class MaskedLMLoss(ScoreLoss):
    """The mean cross-entropy of a row's masked tokens, which are those whose label is not -100.

    A row without targets has the loss zero. `__call__` computes logits at the targets only, one row at a time, if the
    architecture allows it; `scores` computes all logits. Rows are masked once, when they are tokenized.

    Args:
        model: the masked language model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)
        self._output_layer = OutputLayer(self._forward)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the losses alone, float32 `[batch]`."""
        if self._output_layer.supports(model):
            return self._output_layer.compute_target_losses(model, inputs, drop_padding(inputs["labels"], inputs))
        return super().__call__(model, inputs)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits, float32 `[batch, tokens, vocabulary]`."""
        # The virtual tokens of prompt tuning stand in front and have no labels.
        return self._forward(model, inputs)[:, -inputs["input_ids"].shape[1] :]

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        return token_losses(scores, drop_padding(inputs["labels"], inputs))
