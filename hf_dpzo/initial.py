"""Where a run began: which model, and which initial values of what is trained.

Weights are these values plus the replay of a log. Where a base model gives them back, or a public seed does, nothing
but fingerprints need be kept. An adapter or a head that was made from randomness that nobody kept is saved once, beside
the log.
"""

import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from hf_dpzo.losses import unwrapped
from hf_dpzo.trajectory import replace_durably


INITIAL_FILE = "initial.safetensors"
# All that a log may say about the configuration of a base model: what its head and its padding are made with.
HEAD_OPTIONS = ("id2label", "label2id", "problem_type", "pad_token_id")
# Heads up to this share of the model are saved; what is larger comes out of a base model.
_HEAD_SHARE = 0.1
_SEEDS: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()


@contextmanager
def public_draws(seed: int) -> Iterator[None]:
    """What torch draws inside, to initialize weights, comes from a public seed. Outside it is as if nothing happened.

    >>> with public_draws(1):
    ...     first = torch.nn.Linear(2, 2)
    >>> with public_draws(1):
    ...     second = torch.nn.Linear(2, 2)
    >>> torch.equal(first.weight, second.weight)
    True
    """
    before = torch.get_rng_state()
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)


def seeded_peft_model(model: torch.nn.Module, config: PeftConfig, *, seed: int) -> PeftModel:
    """Return `model` with an adapter whose initial values come from the public `seed`.

    As `peft.get_peft_model`; but a log can tell how to make this one again, so that its initial values are not kept.
    """
    with public_draws(seed):
        made = get_peft_model(model, config)
    _SEEDS[made] = seed
    return made


def adapter_of(model: torch.nn.Module) -> dict[str, Any] | None:
    """How to make the adapter of `model` again: its configuration, and its seed where it has one."""
    if not isinstance(model, PeftModel):
        return None
    config = {name: _plain(value) for name, value in model.active_peft_config.to_dict().items()}
    # Of this machine, or of what will be done with the adapter, or the name that PEFT gives the base model.
    for name in ("runtime_config", "inference_mode", "base_model_name_or_path", "revision", "peft_version"):
        config.pop(name, None)
    return {"config": config, "seed": _SEEDS.get(model)}


def base_of(model: torch.nn.Module) -> dict[str, Any]:
    """Which model the run began from: names for people, and what its head is made with."""
    base = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        return {"architecture": type(base).__name__, "name": "", "revision": None, "head": {}}
    config = json.loads(base.config.to_json_string(use_diff=False))
    return {
        "architecture": type(base).__name__,
        "name": base.config.name_or_path,
        "revision": getattr(base.config, "_commit_hash", None),
        "head": {name: config[name] for name in HEAD_OPTIONS if name in config},
    }


def shapes_fingerprint(named: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and types."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def values_fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the values, bit for bit, wherever they are."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def frozen_fingerprint(model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> str:
    """SHA-256 of everything in `model` that is saved, but for what is `trained`."""
    moving = {id(parameter) for parameter in trained}
    kept = model.state_dict(keep_vars=True).values()
    return values_fingerprint(one for one in kept if isinstance(one, torch.Tensor) and id(one) not in moving)


def save_initial(model: torch.nn.Module, folder: Path) -> None:
    """Save into `folder` the initial values that neither a base model nor a public seed gives back, if there are any.

    Those are of an adapter without a public seed, and of a head, whether it is trained or not.
    """
    kept = {name: p.detach().cpu().contiguous() for name, p in _not_given_back(model)}
    if kept:
        replace_durably(folder / INITIAL_FILE, save(kept))
    else:
        (folder / INITIAL_FILE).unlink(missing_ok=True)  # Of a run that was killed before its log was there.


@torch.no_grad()
def restore_initial(model: torch.nn.Module, folder: Path, *, trained: bool = True) -> None:
    """Give `model` the initial values that are saved in `folder`, if there are any; without `trained` the frozen alone.

    Raises:
        ValueError: the model has no such parameters.
    """
    path, parameters = folder / INITIAL_FILE, dict(model.named_parameters())
    for name, value in (load_file(path) if path.is_file() else {}).items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"{path}: the model has no parameter {name} of that shape; start from the same model.")
        if trained or not parameters[name].requires_grad:
            parameters[name].copy_(value)


def _not_given_back(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    base = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        return []
    body = {id(parameter) for parameter in base.base_model.parameters()}
    head = {name: p for name, p in model.named_parameters() if id(p) not in body}
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = head if sum(p.numel() for p in head.values()) <= _HEAD_SHARE * total else {}
    if isinstance(model, PeftModel) and model not in _SEEDS:
        kept = kept | {name: p for name, p in model.named_parameters() if p.requires_grad}
    return list(kept.items())


def _plain(value: Any) -> Any:
    """`value` as JSON knows it."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
