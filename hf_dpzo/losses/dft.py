"""The loss of dynamic fine-tuning."""

import torch

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.losses.target_log_probs import TargetLogProbs
from hf_dpzo.models.unwrap import Inputs


class DFTLoss(CausalLMLoss):
    """The loss of dynamic fine-tuning (Wu et al. 2025): each token's cross-entropy, weighted by its own probability.

    The weight is a constant to a gradient, so that the gradient is that of minus the probability. A difference of
    values cannot hold a part of them constant, and the values alone, `-p log p`, are as small for an impossible token
    as for a certain one. So `__call__`, which is trained on, returns minus the mean probability of the targets, whose
    gradient is the published one. `evaluate` returns the published value.

    Args:
        model: the causal language model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._log_probs = TargetLogProbs(model)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the losses that are trained on, float32 `[batch]`; zero for a row without targets."""
        targets = self._targets(inputs)
        is_target = targets != IGNORE_INDEX
        probabilities = self._log_probs(model, inputs, targets).exp() * is_target
        return -probabilities.sum(dim=1) / is_target.sum(dim=1).clamp(min=1)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return the published loss of each row, float32 `[batch]`."""
        targets = self._targets(inputs)
        is_target = targets != IGNORE_INDEX
        own = targets.masked_fill(~is_target, 0).unsqueeze(2)
        log_probs = scores[:, :-1].log_softmax(dim=-1).gather(2, own).squeeze(2)
        return -(log_probs.exp() * log_probs * is_target).sum(dim=1) / is_target.sum(dim=1).clamp(min=1)
