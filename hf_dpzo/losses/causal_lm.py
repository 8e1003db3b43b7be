"""The loss of a causal language model."""

import torch
import torch.nn.functional as F

from hf_dpzo.losses.output_layer import IGNORE_INDEX, OutputLayer
from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss
from hf_dpzo.models.unwrap import Inputs


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
