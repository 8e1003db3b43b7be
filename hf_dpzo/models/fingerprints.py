"""Fingerprints: the SHA-256 of shapes, and of values bit for bit."""

import hashlib
from collections.abc import Iterable, Mapping

import torch

from hf_dpzo.distributed.sharding import gather_full_tensor
from hf_dpzo.models.adapters import name_as_published
from hf_dpzo.models.precision import inner_tensors
from hf_dpzo.models.set_aside import find_set_aside


def fingerprint_shapes(named: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and types of tensors."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint_values(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' values, bit for bit, the same on every device.

    A quantized tensor counts by its packed bits and scales. Sharded tensors are gathered, so every process must call
    this.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        for inner in inner_tensors(gather_full_tensor(tensor)):
            digest.update(inner.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def fingerprint_frozen(model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of everything that is saved with `model`, except for the `trained` parameters.

    What a model has set aside counts too, because what is trained rests on it.
    Adapters beside the one that is trained count for nothing: they take no part, and are not saved.
    """
    trained_ids = {id(parameter) for parameter in trained}
    saved = name_as_published(model, model.state_dict(keep_vars=True)).values()
    base = find_set_aside(model)
    below = () if base is None else base.state_dict(keep_vars=True).values()
    return fingerprint_values(
        value for value in (*below, *saved) if isinstance(value, torch.Tensor) and id(value) not in trained_ids
    )
