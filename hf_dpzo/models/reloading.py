"""Tries, before anything is spent, whether an adapter comes back from what PEFT saves of it as it was.

Some initializations change the weights of the base model, and do it again, otherwise, when the adapter is loaded. Some
need what was not saved, and some kinds of adapters save less than they are. No list of them is complete, so each is
tried: a layer of each shape is saved and loaded twice, by other random numbers, and both must be what was saved.
"""

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.models.seeded import publicly_seeded


# The seeds of two reloads. Only their difference counts.
_SEEDS = (0, 1)


# How PEFT calls the layer that an adapter is on.
_BASE = "base_layer."


def refuse_inexact_reload(model: torch.nn.Module) -> None:
    """Raise `ValueError` for an adapter that PEFT would not load as it was trained.

    Args:
        model: the model, with its adapter if it has one. Nothing of it is changed.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        return
    if is_sharded(model.parameters()):
        return
    config = model.active_peft_config
    for place, layer in _pick_layers(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What PEFT warns of as it saves, it says again when the user saves.
            fault = _find_fault(model, place, layer)
        if fault is not None:
            init = getattr(config, "init_lora_weights", None)
            named = "adapter" if init is None else f"init_lora_weights={init!r}"
            raise ValueError(
                f"{named}: saved and loaded again by PEFT, the adapter of {place} {fault}, so that what is published "
                'would be another model than was trained; choose init_lora_weights=True or "gaussian", or another kind '
                "of adapter."
            )


def _pick_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield a layer with the adapter of each kind and shape, with its name in the model."""
    seen = set()
    for place in model.base_model.targeted_module_names:
        layer = model.base_model.model.get_submodule(place)
        if not isinstance(layer, BaseTunerLayer):
            continue
        form = (type(layer), *((name, tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()))
        if form not in seen:
            seen.add(form)
            yield place, layer


def _find_fault(model: PeftModel, place: str, layer: BaseTunerLayer) -> str | None:
    """Return what becomes of the adapter of `layer` that is saved and loaded; `None` if it stays what it is."""
    name, prefix = model.active_adapter, f"base_model.model.{place}."
    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    own = {key.removeprefix("base_model.model."): value for key, value in saved.items() if key.startswith(prefix)}
    try:
        config = _reload_config(model.peft_config[name])
        first, second = (_reload_layer(layer, place, config, own, seed=seed) for seed in _SEEDS)
    except Exception as error:
        return None if not _is_loadable_otherwise(model, place, layer, own) else f"fails ({type(error).__name__})"
    if not _are_equal(first, second):
        return "is another one each time"
    there = {key.replace(f".{name}", ".default"): value for key, value in layer.state_dict().items()}
    of_adapter = {key: value for key, value in first.items() if not key.startswith(_BASE)}
    if not _are_equal(of_adapter, {key: there[key] for key in of_adapter if key in there}):
        return "is another one"
    return None


def _reload_config(config: PeftConfig) -> PeftConfig:
    """Return the configuration as its file gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return PeftConfig.from_pretrained(folder)


def _reload_layer(
    layer: BaseTunerLayer, place: str, config: PeftConfig, saved: Mapping[str, torch.Tensor], *, seed: int
) -> dict[str, torch.Tensor]:
    """Return all tensors of a layer whose adapter is made anew from `config`, and given what was `saved`."""
    root = torch.nn.Module()
    parent = root
    *path, last = place.split(".")
    for part in path:
        child = torch.nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(last, copy.deepcopy(layer.get_base_layer()))
    with publicly_seeded(seed):
        loaded = inject_adapter_in_model(copy.deepcopy(config), root)
        set_peft_model_state_dict(loaded, {key: value.clone() for key, value in saved.items()})
    return loaded.get_submodule(place).state_dict()


def _is_loadable_otherwise(
    model: PeftModel, place: str, layer: BaseTunerLayer, saved: Mapping[str, torch.Tensor]
) -> bool:
    """Return whether the initialization alone keeps a layer from being loaded by itself."""
    config = copy.deepcopy(model.active_peft_config)
    if getattr(config, "init_lora_weights", True) in (True, False, "gaussian"):
        return False
    try:
        config.init_lora_weights = True
        _reload_layer(layer, place, config, saved, seed=_SEEDS[0])
    except Exception:
        return False
    return True


def _are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(_has_bits(value, other[key]) for key, value in one.items())


def _has_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device, one.dtype))
