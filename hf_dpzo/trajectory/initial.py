"""Where a run began: its base model, and the initial values of what it trains.

The weights of a run are these values plus the replay of its log. Where a base model or a public seed gives the values
back, only fingerprints are kept. An adapter or a head drawn from randomness that was not kept is saved once, beside the
log.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from hf_dpzo.distributed.sharding import copy_from_full_, gather_full_tensor, to_local
from hf_dpzo.io.files import write_atomically
from hf_dpzo.io.strict_json import abbreviate
from hf_dpzo.models.adapters import list_saved, name_as_published
from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.models.location import find_cached_commit
from hf_dpzo.models.precision import describe_loading
from hf_dpzo.models.seeded import get_adapter_seed
from hf_dpzo.models.unwrap import class_name, unwrap_model
from hf_dpzo.trajectory.adapters import describe_adapter_config
from hf_dpzo.trajectory.feature_base import describe_feature_base
from hf_dpzo.trajectory.header import TrajectoryError


INITIAL_FILE = "initial.safetensors"


# All that a log may say about the configuration of a base model: how its head and its padding are built.
HEAD_OPTIONS = ("id2label", "label2id", "problem_type", "pad_token_id")


# The most that the header of the initial file may take: over a hundred bytes for each of 100000 parameters.
MAX_TENSOR_HEADER_BYTES = 1 << 24


# The names of types in safetensors.
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_TYPES |= {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}  # For heads that are packed.


# Heads up to this share of the model are saved. A larger one comes from a base model.
_HEAD_SHARE = 0.1


def describe_adapter(model: torch.nn.Module) -> dict[str, Any] | None:
    """Describe how to build the adapter of `model` again: its configuration, and its public seed if it has one."""
    if not isinstance(model, PeftModel):
        return None
    return {"config": describe_adapter_config(model), "seed": get_adapter_seed(model)}


def describe_base_model(model: torch.nn.Module) -> dict[str, Any]:
    """Describe the model that the run began from: names for people, and how it is loaded and its head built."""
    base = unwrap_model(model)
    if not isinstance(base, PreTrainedModel):
        return {"architecture": class_name(base), "name": "", "revision": None, "head": {}}
    config = json.loads(base.config.to_json_string(use_diff=False))
    head = {name: config[name] for name in HEAD_OPTIONS if name in config}
    if isinstance(base, FeatureClassifier):
        return {"head": head, **describe_feature_base(base)}
    return {
        "architecture": class_name(base),
        "name": base.config.name_or_path,
        "revision": getattr(base.config, "_commit_hash", None) or find_cached_commit(base.config.name_or_path),
        "head": head,
        **describe_loading(model),
    }


def collect_initial_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the initial values that neither a base model nor a public seed gives back.

    These belong to an adapter without a public seed, and to a head, whether it is trained or not. Where they are
    sharded over processes, every process must call this.
    """
    return {name: gather_full_tensor(p.detach()).cpu().contiguous() for name, p in _find_unrecoverable(model)}


def save_initial_values(values: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Save initial `values` into `folder`; without any, delete an old file of them."""
    if values:
        write_atomically(folder / INITIAL_FILE, save(dict(values)))
    else:
        (folder / INITIAL_FILE).unlink(missing_ok=True)  # Left by a run that was killed before it had a log.


@torch.no_grad()
def restore_initial_values(model: torch.nn.Module, folder: Path, *, include_trained: bool = True) -> None:
    """Give `model` the initial values saved in `folder`, if there are any.

    Guarantee: whatever the file holds, only tensors that match one of the model's in name, shape and type are loaded.

    Args:
        model: the model, with its adapter if it has one.
        folder: the folder of the log.
        include_trained: whether to restore trained parameters too, and not only frozen ones.

    Raises:
        TrajectoryError: the file is damaged, or the model has no such parameters.
    """
    path = folder / INITIAL_FILE
    if not path.is_file():
        return
    own = dict(model.named_parameters())
    parameters = own | name_as_published(model, own)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_TENSOR_HEADER_BYTES:
        raise TrajectoryError(f"{path}: its header has {length} bytes, and no run's has so many; use another copy.")
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a mapping.
                _check_match(path, name, tensors.get_slice(name), parameters.get(name))
            for name in tensors.keys():  # noqa: SIM118
                if include_trained or not parameters[name].requires_grad:
                    copy_from_full_(parameters[name], _check_finite(path, name, tensors.get_tensor(name)))
    except SafetensorError as error:
        raise TrajectoryError(f"{path}: it is damaged ({error!s:.100}); use another copy.") from error


def _check_match(path: Path, name: str, saved: Any, parameter: torch.Tensor | None) -> None:
    """Raise unless `saved`, of which nothing has been read yet, has the shape and the type of `parameter`."""
    dtype = _TYPES.get(saved.get_dtype())
    if parameter is None or list(parameter.shape) != saved.get_shape() or parameter.dtype != dtype:
        raise TrajectoryError(
            f"{path}: the model has no parameter {abbreviate(name)} of that shape and type; start from the same model."
        )


def _check_finite(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.isfinite().all():
        raise TrajectoryError(f"{path}: {abbreviate(name)} holds a number that is not finite; use another copy.")
    return value


def _find_unrecoverable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    base = unwrap_model(model)
    if not isinstance(base, PreTrainedModel):
        return []
    body = {id(parameter) for parameter in base.base_model.parameters()}
    named = name_as_published(model, dict(model.named_parameters()))
    # A quantized head was not created here, so it comes from the base model.
    unquantized = ((n, p) for n, p in named.items() if not is_traceable_wrapper_subclass(to_local(p)))
    head = {name: p for name, p in unquantized if id(p) not in body}
    total = sum(parameter.numel() for parameter in named.values())
    is_small = sum(p.numel() for p in head.values()) <= _HEAD_SHARE * total
    kept = head if is_small or isinstance(base, FeatureClassifier) else {}
    if isinstance(model, PeftModel) and get_adapter_seed(model) is None:
        saved = list_saved(model, model.active_adapter)  # With what is frozen of it.
        kept = kept | {name: p for name, p in named.items() if p.requires_grad or id(p) in saved}
    return list(kept.items())
