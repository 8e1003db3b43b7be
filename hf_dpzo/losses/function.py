"""The loss that a user's own function computes."""

from collections.abc import Callable

import torch

from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.unwrap import Inputs, drop_labels


class FunctionLoss(PerExampleLoss):
    """Wraps any function `(model, inputs) -> [batch]`, differentiable or not. The scores are the model's logits.

    Args:
        fn: the function, in whose result the loss of a row must depend on that row alone.

    >>> loss = FunctionLoss(lambda model, inputs: model(inputs["x"]).square().sum(dim=1))
    >>> loss(torch.nn.Identity(), {"x": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
    tensor([25.,  1.])
    """

    def __init__(self, fn: Callable[[torch.nn.Module, Inputs], torch.Tensor]) -> None:
        self.fn = fn

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the model's logits."""
        return model(**drop_labels(inputs)).logits

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, `[batch]`, as the function computes it."""
        return self.fn(model, inputs)

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses, `[batch]`, and the model's logits."""
        return self.fn(model, inputs), self.scores(model, inputs)
