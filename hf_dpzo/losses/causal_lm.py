"""The loss of a causal language model."""

import torch
import torch.nn.functional as F

from hf_dpzo.losses.output_layer import OutputLayer
from hf_dpzo.losses.per_example import IGNORE_INDEX, ForwardPass, ScoreLoss
from hf_dpzo.losses.target_log_probs import shift_targets
from hf_dpzo.models.unwrap import Inputs


class CausalLMLoss(ScoreLoss):
    """The mean cross-entropy of a row's target tokens, which are those whose label is not -100.

    A row without targets has the loss zero. `__call__` computes logits at the targets only, one row at a time, if the
    architecture allows it; `scores` computes all logits. A subclass that overrides `losses` must override `__call__`
    too.

    Args:
        model: the causal language model.
    """

    can_continue = True

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)
        self._output_layer = OutputLayer(self._forward)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the losses alone, float32 `[batch]`."""
        if self._output_layer.supports(model):
            return self._output_layer.compute_target_losses(model, inputs, self._targets(inputs))
        return super().__call__(model, inputs)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the next-token logits, float32 `[batch, tokens, vocabulary]`."""
        # The virtual tokens of prompt tuning stand in front and have no labels.
        return self._forward(model, inputs)[:, -inputs["input_ids"].shape[1] :]

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        targets = self._targets(inputs)
        losses = F.cross_entropy(scores[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORE_INDEX)
        return losses.sum(dim=1) / (targets != IGNORE_INDEX).sum(dim=1).clamp(min=1)

    def _targets(self, inputs: Inputs) -> torch.Tensor:
        """Return the token to predict after each token but the last, `[batch, tokens - 1]`; -100 for none."""
        return shift_targets(inputs["labels"], inputs.get("attention_mask"))
