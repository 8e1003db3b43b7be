"""Several probe points in one forward pass, for adapters.

The frozen weights are read once for all points, and layers below the first adapter are computed once. The price is
memory for the activations at all points. `torch.func.vmap` keeps the points apart.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from hf_dpzo.losses.features import FeatureClassificationLoss
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.unwrap import Inputs
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.folded_attention import FoldedAttention


@dataclass(frozen=True, kw_only=True)
class BatchedPointsLoss:
    """A loss at several values of the trained parameters at once.

    Args:
        loss: the loss of a micro-batch at one point.
        parameters: the values of each parameter by its name, `[points, *shape]`.
    """

    loss: PerExampleLoss
    parameters: Mapping[str, torch.Tensor]

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row at each point, `[batch, points]`."""
        if isinstance(self.loss, FeatureClassificationLoss):
            return self.loss.at_points(model, inputs, self.parameters)
        module = _LossModule(model, self.loss)
        named = {f"model.{name}": values for name, values in self.parameters.items()}

        def evaluate_at(point: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(module, point, (inputs,))

        on_cpu = next(iter(named.values())).device.type == "cpu"
        with FoldedAttention() if on_cpu else nullcontext():
            return torch.func.vmap(evaluate_at, out_dims=1)(named)


class _LossModule(torch.nn.Module):
    """A loss as a module, so that `functional_call` can exchange the model's parameters."""

    def __init__(self, model: torch.nn.Module, loss: PerExampleLoss) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self._loss = loss

    def forward(self, inputs: Inputs) -> torch.Tensor:
        return self._loss(self.model, inputs)


def at_stacks(losses: BatchLosses, model: torch.nn.Module, stacks: Mapping[torch.Tensor, torch.Tensor]) -> BatchLosses:
    """Return `losses` in a form that evaluates a batch at several values of the trained parameters at once.

    Args:
        losses: the losses at one point.
        model: the model to which the parameters belong.
        stacks: the values of each trained parameter, `[points, *shape]`.
    """
    named = {name: stacks[parameter] for name, parameter in model.named_parameters() if parameter in stacks}
    points = len(next(iter(stacks.values())))
    return replace(losses, loss=BatchedPointsLoss(loss=losses.loss, parameters=named), tail=(points,))
