"""What the runs of this process have trained: models, their copies, and the values that runs led to.

A run that began from such values would release more about the same rows than its own card counts, wherever its model
comes from: an argument, a function, or a file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from hf_dpzo.distributed.sharding import to_local
from hf_dpzo.models.precision import inner_tensors
from hf_dpzo.models.unwrap import unwrap_model


# The number of values of a tensor that are compared: so many that no other tensor has them by chance.
_COMPARED = 1024


# The types in which trained values may be loaded again.
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


# Attributes, because deep copies and pickles of a model have them too, and a model whose adapter was taken off.
_MARK, _ORIGIN = "_hf_dpzo_trained", "_hf_dpzo_origin"


# The runs of this process that led to a tensor, by the tensor's key.
_RUNS: dict[str, set[str]] = {}


def mark_as_trained(model: torch.nn.Module) -> None:
    """Mark `model` as one that a trainer of this process has trained. Copies of it are marked too."""
    setattr(unwrap_model(model), _MARK, True)


def is_marked_as_trained(model: torch.nn.Module) -> bool:
    """Return whether a trainer of this process has trained `model`, or what it is a copy of."""
    return getattr(unwrap_model(model), _MARK, False)


def mark_origin(model: torch.nn.Module, *, run: str, claim: Mapping[str, Any] | None) -> None:
    """Mark `model` as rebuilt from the log of a run. Copies of it are marked too.

    Args:
        model: the model.
        run: what identifies the log; see `name_log`.
        claim: the claim of the run's card; `None` if it makes none.
    """
    setattr(unwrap_model(model), _ORIGIN, (run, None if claim is None else dict(claim)))


def get_origin(model: torch.nn.Module) -> tuple[str, Mapping[str, Any] | None] | None:
    """Return the run from whose log `model` was rebuilt, and its claim; `None` if it was not."""
    return getattr(unwrap_model(model), _ORIGIN, None)


class TrainedValues:
    """The values that one run gives to the parameters that it trains.

    Args:
        parameters: the parameters, with their initial values.

    >>> model = torch.nn.Linear(2, 2)
    >>> values = TrainedValues([model.weight])
    >>> _ = model.weight.data.add_(1.0)
    >>> values.record("first")
    >>> loaded = torch.nn.Linear(2, 2)
    >>> _ = loaded.load_state_dict(model.state_dict())
    >>> find_runs(loaded), find_runs(torch.nn.Linear(2, 2))
    ({'first'}, set())
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        self._initial = {key for parameter in self._parameters for key in _list_keys(parameter)}

    def record(self, run: str) -> None:
        """Remember that `run` led to the present values, except for those that it began with."""
        for parameter in self._parameters:
            for key in {*_list_keys(parameter)} - self._initial:
                _RUNS.setdefault(key, set()).add(run)


def find_runs(model: torch.nn.Module) -> set[str]:
    """Return the runs of this process that led to what `model` holds, trained or frozen, in any part of it.

    Of each tensor a thousand values are compared, bit for bit: a billion parameters take some milliseconds.
    """
    if not _RUNS:
        return set()
    held = (*model.parameters(), *model.buffers())
    # A quantized tensor's own parts are looked at, because it may have no values of its own to be compared.
    tensors = (part for tensor in held for part in inner_tensors(to_local(tensor.detach())) if part.dtype in _TYPES)
    return {run for tensor in tensors for run in _RUNS.get(_build_key(tensor, tensor.dtype), ())}


def _list_keys(tensor: torch.Tensor) -> Iterator[str]:
    return (_build_key(tensor, dtype) for dtype in _TYPES)


def _build_key(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    """Return a key of the shape of `tensor` and of some of its values, evenly spaced, as they are in `dtype`."""
    local = to_local(tensor.detach())
    flat = local.reshape(-1)
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(_COMPARED, flat.numel()), dtype=torch.float64).long()
    values = flat[places.to(flat.device)].to(dtype).cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(local.shape)} {dtype} ".encode() + values).hexdigest()
