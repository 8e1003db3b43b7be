"""Several probe points in one forward pass, for adapters.

The frozen weights are read once for all points, and layers below the first adapter are computed once. What it costs is
memory: activations of that many batches. `torch.func.vmap` keeps the points apart.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.unwrap import Inputs
from hf_dpzo.step.batch_losses import BatchLosses


@dataclass(frozen=True, kw_only=True)
class BatchedPointsLoss:
    """A loss at several values of the trained parameters at once. Its plain twin evaluates one after the other.

    Args:
        loss: of a micro-batch, at one point.
        parameters: the values by the names of the parameters, `[points, *shape]` each.
    """

    loss: PerExampleLoss
    parameters: Mapping[str, torch.Tensor]

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """One loss for each row at each point, `[batch, points]`."""
        module = _AsModule(model, self.loss)
        named = {f"model.{name}": values for name, values in self.parameters.items()}

        def at(one: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(module, one, (inputs,))

        with _batched_attention(next(iter(named.values())).device):
            return torch.func.vmap(at, out_dims=1)(named)


class _AsModule(torch.nn.Module):
    """A loss as a module, so that torch can exchange its model's parameters for the time of a call."""

    def __init__(self, model: torch.nn.Module, loss: PerExampleLoss) -> None:
        super().__init__()
        self.training = model.training
        self.model, self._loss = model, loss

    def forward(self, inputs: Inputs) -> torch.Tensor:
        return self._loss(self.model, inputs)


@contextmanager
def _batched_attention(device: torch.device) -> Iterator[None]:
    """On a CPU the plain kernel: torch 2.13 has no batching rule for the other one. Remove when it has."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def at_stacks(losses: BatchLosses, model: torch.nn.Module, stacks: Mapping[torch.Tensor, torch.Tensor]) -> BatchLosses:
    """Return what evaluates a batch at several values of the trained parameters at once.

    Args:
        losses: evaluates it at one point.
        model: the model to which the parameters belong.
        stacks: the values of each trained parameter, `[points, *shape]`.
    """
    named = {name: stacks[one] for name, one in model.named_parameters() if one in stacks}
    points = len(next(iter(stacks.values())))
    return replace(losses, loss=BatchedPointsLoss(loss=losses.loss, parameters=named), tail=(points,))
