"""Parameters of which each process holds a part (`torch.distributed.fsdp.fully_shard`, known as FSDP2).

A direction is addressed by coordinates, so any part of a parameter is moved by the same part of it, wherever it lies.
"""

import math
from collections.abc import Iterable

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether processes hold parts of any of `tensors`."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def gather_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`. Where it is split all processes have to ask for it, and each gets it.

    >>> gather_full_tensor(torch.zeros(3))
    tensor([0., 0., 0.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def get_local_shard(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what this process holds of `parameter`, to be changed in place, and the number of its first coordinate.

    Raises:
        ValueError: what it holds are no consecutive coordinates.

    >>> get_local_shard(torch.zeros(3))
    (tensor([0., 0., 0.]), 0)
    """
    if not isinstance(parameter, DTensor):
        return parameter, 0
    for placement in parameter.placements:
        if not placement.is_replicate() and placement != Shard(0):
            raise ValueError(f"parameter: it is split as {placement}; split it along its first dimension.")
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), offset[0] * math.prod(parameter.shape[1:]) if offset else 0


@torch.no_grad()
def copy_from_full_(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Give `parameter` the `values` of the whole, of which this process keeps its part.

    >>> parameter = torch.zeros(2)
    >>> copy_from_full_(parameter, torch.ones(2))
    >>> parameter
    tensor([1., 1.])
    """
    part, first = get_local_shard(parameter)
    part.copy_(values.reshape(-1)[first : first + part.numel()].view_as(part))


def get_shard_index(tensors: Iterable[torch.Tensor]) -> int:
    """Return which part of them this process holds, from 0; the same in processes that hold the same."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            number, mesh = 0, tensor.device_mesh
            for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), tensor.placements, strict=True):
                number = number * size + place if placement.is_shard() else number
            return number
    return 0


def find_fsdp_roots(model: torch.nn.Module) -> list[FSDPModule]:
    """Return the outermost modules of `model` that FSDP shards."""
    if isinstance(model, FSDPModule):
        return [model]
    return [root for child in model.children() for root in find_fsdp_roots(child)]


def gather_state_dict(model: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return the state of `model`, put together on the CPU, for which all processes have to ask.

    Args:
        model: with parameters that are split.
        keep: whether this process needs it; else it gets nothing, and needs memory for one tensor at a time.
    """
    found, known = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:  # One under two names stays one, as whoever saves it expects.
            gathered = gather_full_tensor(tensor.detach())
            known[id(tensor)] = gathered.cpu() if keep else None
        if keep:
            found[name] = known[id(tensor)]
    return found


def refuse_sharded_push(trained: Iterable[torch.Tensor]) -> None:
    """Raise `ValueError` where one process alone can not save what is trained."""
    if is_sharded(trained):
        raise ValueError(
            "push_to_hub: what is trained is split over processes, and pushing is done by one of them; call save_model "
            "in all, and upload its folder."
        )
