"""Parameters of which each process holds a part (`torch.distributed.fsdp.fully_shard`).

A direction is addressed by coordinates, so any part of a parameter is moved by the same part of it, wherever it lies.
"""

import math

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what this process holds of `parameter`, to be changed in place, and the number of its first coordinate.

    Raises:
        ValueError: what it holds are no consecutive coordinates.

    >>> local_part(torch.zeros(3))
    (tensor([0., 0., 0.]), 0)
    """
    if not isinstance(parameter, DTensor):
        return parameter, 0
    for placement in parameter.placements:
        if not placement.is_replicate() and placement != Shard(0):
            raise ValueError(f"parameter: it is split as {placement}; split it along its first dimension.")
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), offset[0] * math.prod(parameter.shape[1:]) if offset else 0


def reshard(model: torch.nn.Module) -> None:
    """Let the next forward pass gather the parameters anew.

    FSDP keeps those of the root whole after a forward pass without gradients, and would not see that parts have moved.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
