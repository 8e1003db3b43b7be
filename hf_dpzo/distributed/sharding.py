"""Parameters of which each process holds a shard (`torch.distributed.fsdp.fully_shard`, known as FSDP2).

A direction is addressed by coordinates, so a process moves its shard of a parameter without the rest of it.
"""

import math
from collections.abc import Iterable

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether any of `tensors` is sharded over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def gather_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`. Where it is sharded, all processes must call this, and each gets the whole.

    >>> gather_full_tensor(torch.zeros(3))
    tensor([0., 0., 0.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the shard of `tensor` that this process holds, or all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def get_local_shard(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the shard of `parameter` that this process holds, to be changed in place, and its first coordinate.

    Raises:
        ValueError: the coordinates of the shard are not consecutive.

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
    """Copy to `parameter`, in place, its shard of `values`, which are those of the whole parameter.

    >>> parameter = torch.zeros(2)
    >>> copy_from_full_(parameter, torch.ones(2))
    >>> parameter
    tensor([1., 1.])
    """
    shard, start = get_local_shard(parameter)
    shard.copy_(values.reshape(-1)[start : start + shard.numel()].view_as(shard))


def get_shard_index(tensors: Iterable[torch.Tensor]) -> int:
    """Return the index, from 0, of the shard of `tensors` that this process holds; equal shards have equal indices."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            index = 0
            mesh = tensor.device_mesh
            for size, coordinate, placement in zip(mesh.shape, mesh.get_coordinate(), tensor.placements, strict=True):
                index = index * size + coordinate if placement.is_shard() else index
            return index
    return 0


def find_fsdp_roots(model: torch.nn.Module) -> list[FSDPModule]:
    """Return the outermost modules of `model` that FSDP shards."""
    if isinstance(model, FSDPModule):
        return [model]
    return [root for child in model.children() for root in find_fsdp_roots(child)]


def gather_state_dict(model: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return the state of `model`, gathered on the CPU. All processes must call this.

    Args:
        model: a model whose parameters may be sharded.
        keep: whether this process needs the state. Otherwise it gets none, and needs memory for one tensor at a time.
    """
    state = {}
    gathered_by_id = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered_by_id:  # Tied weights stay one tensor, which code that saves them relies on.
            gathered = gather_full_tensor(tensor.detach())
            gathered_by_id[id(tensor)] = gathered.cpu() if keep else None
        if keep:
            state[name] = gathered_by_id[id(tensor)]
    return state


def refuse_sharded_push(trained: Iterable[torch.Tensor]) -> None:
    """Raise `ValueError` where trained parameters are sharded, since the process that pushes cannot save them alone."""
    if is_sharded(trained):
        raise ValueError(
            "push_to_hub: what is trained is split over processes, and pushing is done by one of them; call save_model "
            "in all, and upload its folder."
        )
