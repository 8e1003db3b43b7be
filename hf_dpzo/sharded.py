"""Parameters of which each process holds a part (`torch.distributed.fsdp.fully_shard`).

A direction is addressed by coordinates, so any part of a parameter is moved by the same part of it, wherever it lies.
"""

import math

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


# One process, or several of which each holds the model.
WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU")


def refuse_sharded(model: torch.nn.Module, *, distributed_type: str) -> None:
    """Raise `ValueError` for a model of which this process holds a part.

    Args:
        model: to be trained.
        distributed_type: how accelerate calls the way in which processes work together.
    """
    if distributed_type not in WHOLE:
        raise ValueError(
            f"distributed_type={distributed_type}: its processes do not each hold the whole model; launch with "
            "--multi_gpu, or by torchrun."
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, DTensor):
            raise ValueError(f"model: {name} is split over processes, which runs can not train yet; load it whole.")


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


def sharded_modules(model: torch.nn.Module) -> list[FSDPModule]:
    """Return the modules that are to be resharded before a forward pass, once parameters have moved.

    FSDP keeps those of the root whole after a forward pass without gradients, and would not see that parts have moved.
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
