"""SHA-256 of the shapes and values of parameters, bit for bit."""

import hashlib
from collections.abc import Iterable, Mapping

import torch

from hf_dpzo.distributed.sharding import gather_full_tensor
from hf_dpzo.models.precision import inner_tensors


def fingerprint_shapes(named: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and types."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint_values(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the values, bit for bit, wherever they are; of quantized ones of their packed bits and scales.

    Where they are split over processes, all of these have to ask.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        for inner in inner_tensors(gather_full_tensor(tensor)):
            digest.update(inner.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def fingerprint_frozen(model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> str:
    """SHA-256 of everything in `model` that is saved, but for what is `trained`."""
    moving = {id(parameter) for parameter in trained}
    kept = model.state_dict(keep_vars=True).values()
    return fingerprint_values(one for one in kept if isinstance(one, torch.Tensor) and id(one) not in moving)
