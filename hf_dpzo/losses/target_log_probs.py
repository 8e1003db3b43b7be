"""The log-probabilities that a causal language model gives to the tokens that it should predict."""

import torch
import torch.nn.functional as F

from hf_dpzo.losses.output_layer import OutputLayer
from hf_dpzo.losses.per_example import IGNORE_INDEX, ForwardPass
from hf_dpzo.models.unwrap import Inputs


class TargetLogProbs:
    """Computes the log-probability of each target token, at the targets only if the architecture allows it.

    Args:
        model: the causal language model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)
        self._output_layer = OutputLayer(self._forward)

    def __call__(self, model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities, float32 `[batch, tokens - 1]`; zero where there is no target.

        Args:
            model: the causal language model.
            inputs: the model's inputs, with `input_ids` `[batch, tokens]`.
            targets: the token to predict after each token but the last, `[batch, tokens - 1]`; -100 for none.
        """
        if self._output_layer.supports(model):
            return self._output_layer.compute_target_log_probs(model, inputs, targets)
        logits = self._forward(model, inputs)[:, -inputs["input_ids"].shape[1] :]
        return -F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORE_INDEX)


def shift_targets(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the token to predict after each token but the last, `[batch, tokens - 1]`; -100 for none.

    Nothing is predicted from padding: how much of it a row has depends on the other rows of its batch.

    Args:
        labels: the tokens, or -100 for those that are not to be predicted, `[batch, tokens]`.
        attention_mask: zero at padding, `[batch, tokens]`; `None` if there is no padding.

    >>> shift_targets(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]])).tolist()
    [[-100, 6]]
    """
    targets = labels[:, 1:]
    if attention_mask is None:
        return targets
    return targets.masked_fill(attention_mask[:, :-1] == 0, IGNORE_INDEX)
