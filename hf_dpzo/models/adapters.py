"""The adapter that a run trains: it alone computes, moves and is saved, whatever it is called and whoever is beside it.

Outside the model it has PEFT's own name for a single adapter. So a log, a folder and a replay need not know how it was
called, nor which others there were.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from hf_dpzo.distributed.sharding import is_sharded, to_local
from hf_dpzo.models.adapter_scale import refuse_scaled_layer


T = TypeVar("T")


# PEFT keeps the files of an adapter of this name in the folder itself, and those of others in folders within.
PUBLISHED_NAME = "default"


_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


# What holds the parts of adapters, each under the name of its adapter.
_HOLDERS = (torch.nn.ModuleDict, torch.nn.ParameterDict, BufferDict)


# The modules that adapters were put around.
_WRAPPED = ("base_layer", "original_module", "model", "base_model")


# The card that PEFT writes.
_CARD = "README.md"


def find_trained_adapter(model: torch.nn.Module) -> str | None:
    """Return the name of the adapter of `model` that a run trains; `None` for a model without any.

    Guarantee: in every layer that has adapters, this one alone computes, and none is merged into weights.

    Raises:
        ValueError: another adapter computes too or instead, this one does not, or no PEFT model holds it.
    """
    own = (model, model.base_model) if isinstance(model, PeftModel) else ()
    layers = []
    for module in model.modules():
        if isinstance(module, _LAYERS):
            layers.append(module)
        is_held = not isinstance(module, PeftModel | BaseTuner) or any(module is one for one in own)
        if not is_held or (isinstance(module, PreTrainedModel) and module._hf_peft_config_loaded):
            raise _build_unheld_error(by_transformers=is_held)
    if not own:
        if layers:
            raise _build_unheld_error(by_transformers=False)
        return None
    name = model.active_adapter
    for layer in layers:
        _refuse_layer(layer, model, name)
        refuse_scaled_layer(layer, model, name)
    return name


def _build_unheld_error(*, by_transformers: bool) -> ValueError:
    how = "transformers added or loaded it" if by_transformers else "no PeftModel around the whole model holds it"
    return ValueError(
        f"model: it has an adapter, and {how}, so that neither log nor folder could tell what was trained; make it "
        "by hf_dpzo.seeded_peft_model, or load it by PeftModel.from_pretrained with is_trainable=True, on a model "
        "that has none."
    )


def _refuse_layer(layer: torch.nn.Module, model: PeftModel, name: str) -> None:
    """Raise `ValueError` unless in a `layer` of `model` the adapter `name` alone computes if it is there."""
    held = {adapter for _, holder in _list_holders(layer) for adapter in holder.keys()}  # noqa: SIM118 - no mapping.
    # PEFT skips the active adapters that a layer does not hold.
    computing = [active for active in layer.active_adapters if active in held]
    disabled = name in held and layer.disable_adapters
    if not layer.merged_adapters and not disabled and computing == [name] * (name in held):
        return
    place = next(place for place, module in model.named_modules() if module is layer)
    if layer.merged_adapters:
        raise ValueError(
            f"adapter={name}: {', '.join(layer.merged_adapters)} was merged into the weights of {place}, where no "
            "update would reach it; call unmerge_adapter()."
        )
    if disabled:
        raise ValueError(f"adapter={name}: it is disabled in {place}; call model.base_model.enable_adapter_layers().")
    raise ValueError(
        f"adapter={name}: in {place} {' and '.join(computing) or 'none'} computes, and one alone is trained, "
        "evaluated and saved; call model.set_adapter with its name."
    )


def refuse_unsaved_parameters(model: torch.nn.Module) -> None:
    """Raise `ValueError` if anything that is trained would not be saved with the adapter that is trained.

    Raises:
        ValueError: a trained parameter is of another adapter or of the base model; or an adapter is called like a
            module, by which PEFT would leave parameters out.
    """
    name = find_trained_adapter(model)
    if name is None:
        return
    named = name_as_published(model, dict(model.named_parameters()))
    segments = {segment for key in named for segment in key.split(".")}
    for adapter in model.peft_config:
        if adapter in segments - {PUBLISHED_NAME}:
            raise ValueError(
                f"adapter={adapter}: a part of the model is called so too, and PEFT, which saves by names, would mix "
                "them up; give the adapter another name."
            )
    kept = list_saved(model, name)
    if model.peft_config[name].is_prompt_learning:
        # What is saved is what the encoder of the virtual tokens computes.
        kept |= {id(parameter) for parameter in model.prompt_encoder[name].parameters()}
    own = {id(parameter) for parameter in named.values()}
    for key, parameter in model.named_parameters():
        if id(parameter) in kept - own:
            raise ValueError(
                f"parameter={key}: it is of another adapter, and would be saved with adapter={name}; load the model "
                "anew, without that one."
            )
        if parameter.requires_grad and id(parameter) not in kept:
            raise ValueError(
                f"parameter={key}: it is trained, and would not be saved with adapter={name}; freeze it, or name its "
                "module in modules_to_save of the adapter's configuration."
            )


def list_saved(model: PeftModel, name: str) -> set[int]:
    """Return the identities of the parameters that PEFT saves with the adapter `name`, without gathering any."""
    state = model.state_dict(keep_vars=True)
    values = list(state.values())
    # Of a split model, PEFT would gather what it is given, so it is given the numbers of the tensors instead.
    numbered = is_sharded(model.parameters())
    given = {key: torch.tensor([number]) for number, key in enumerate(state)} if numbered else state
    saved = get_peft_model_state_dict(model, state_dict=given, adapter_name=name, save_embedding_layers=False).values()
    return {id(values[int(number)]) for number in saved} if numbered else {id(value) for value in saved}


def list_adapters(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters of `model`, the one that a run trains first; see `find_trained_adapter`."""
    name = find_trained_adapter(model)
    return () if name is None else (name, *sorted(set(model.peft_config) - {name}))


def refuse_switched_adapter(model: torch.nn.Module, adapters: Sequence[str], trained: Iterable[torch.Tensor]) -> None:
    """Raise `ValueError` unless `model` still computes with the same adapter and the `trained` parameters.

    It reads no weights: a model of 30 layers, with adapters on all linear ones, takes some milliseconds.

    Args:
        model: the model, whose adapters anybody may have changed since training began.
        adapters: what `list_adapters` returned when training began.
        trained: the parameters that updates move.
    """
    current = list_adapters(model)
    if current[:1] != tuple(adapters[:1]):
        now, then = (next(iter(names), None) for names in (current, adapters))
        raise ValueError(
            f"adapter={now}: training began with adapter={then}, which the log leads to; switch back by "
            "set_adapter, or make a new trainer for the other one."
        )
    if current != tuple(adapters):
        changed = sorted(set(current) ^ set(adapters))
        raise ValueError(
            f"adapter={changed[0]}: it was added or deleted since training began; leave adapters as they are until "
            "what was trained is saved."
        )
    present = {id(parameter) for parameter in model.parameters()}
    if not all(id(parameter) in present for parameter in trained):
        raise ValueError(
            "model: it no longer holds all that is trained, so that updates do not reach what computes; leave its "
            "modules and adapters as they are until it is saved."
        )


def refuse_refrozen_parameters(model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> None:
    """Raise `ValueError` unless the parameters of `model` that require grad are the `trained` ones, and no others."""
    moved = {id(parameter) for parameter in trained}
    if all(parameter.requires_grad == (id(parameter) in moved) for parameter in model.parameters()):
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (id(parameter) in moved):
            change = "unfrozen, and no update moves it" if parameter.requires_grad else "frozen, and updates move it"
            raise ValueError(
                f"parameter={name}: since training began it was {change}; choose what is trained before that."
            )


def name_as_published(model: torch.nn.Module, named: Mapping[str, T]) -> dict[str, T]:
    """Return what `named` holds by the names in `model`, without other adapters, and with the trained one renamed.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> model = get_peft_model(model, LoraConfig(target_modules=["0"]), adapter_name="mine")
    >>> [name for name in name_as_published(model, dict(model.named_parameters())) if "lora_A" in name]
    ['base_model.model.0.lora_A.default.weight']
    """
    if not isinstance(model, PeftModel):
        return dict(named)
    prefixes = {
        f"{holder_name}.{adapter}": (holder_name, adapter)
        for place, module in model.named_modules()
        for holder_name, holder in _list_holders(module, place)
        for adapter in holder.keys()  # noqa: SIM118 - it is no mapping.
    }
    renamed = {}
    for key, value in named.items():
        prefix = next((prefix for prefix in _list_ancestors(key) if prefix in prefixes), None)
        holder_name, adapter = prefixes.get(prefix, ("", None))
        if adapter == model.active_adapter:
            renamed[f"{holder_name}.{PUBLISHED_NAME}{key.removeprefix(prefix)}"] = value
        elif adapter is None:
            renamed[key] = value
    return renamed


def _list_ancestors(key: str) -> Iterator[str]:
    """Return the names that lead to `key`, and `key` itself."""
    segments = key.split(".")
    return (".".join(segments[:length]) for length in range(1, len(segments) + 1))


def _list_holders(module: torch.nn.Module, place: str = "") -> list[tuple[str, torch.nn.Module]]:
    """Return the names and the modules that hold parts of adapters directly in `module`, at `place` in its model."""
    if not isinstance(module, (*_LAYERS, BaseTuner, PeftModel)):
        return []
    return [
        (f"{place}.{name}" if place else name, child)
        for name, child in module.named_children()
        if isinstance(child, _HOLDERS) and name not in _WRAPPED
    ]


def has_trained_values(model: PeftModel) -> bool:
    """Return whether the adapter that is trained has been trained before, as far as its kind shows it.

    The second factor of a new LoRA adapter is zero, unless its configuration asks for another start.
    """
    name = model.active_adapter
    if getattr(model.peft_config[name], "init_lora_weights", None) not in (True, "gaussian"):
        return False
    factors = (module.lora_B for module in model.modules() if isinstance(module, LoraLayer) and name in module.lora_B)
    return any(
        bool(to_local(parameter.detach()).any()) for factor in factors for parameter in factor[name].parameters()
    )


def list_adapted_modules(model: PeftModel) -> list[str]:
    """Return the names, in the model inside `model`, of the modules that the trained adapter is on."""
    tuner = model.base_model
    holders = {name: _list_holders(tuner.model.get_submodule(name)) for name in tuner.targeted_module_names}
    adapter = model.active_adapter
    return sorted(name for name, held in holders.items() if any(adapter in holder.keys() for _, holder in held))  # noqa: SIM118


@contextmanager
def saved_alone(model: torch.nn.Module) -> Iterator[None]:
    """Let `model.save_pretrained`, in a `with` statement, save the trained adapter alone, into the folder itself.

    Stock's Trainer would save every adapter, each but `PUBLISHED_NAME` in a folder of its own.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    stock = model.save_pretrained

    def save(folder: str, **options: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if model.active_adapter == PUBLISHED_NAME:
            stock(folder, selected_adapters=[PUBLISHED_NAME], **options)
            return
        with TemporaryDirectory(dir=folder, prefix="_adapter-") as scratch:
            if Path(folder, _CARD).is_file():
                shutil.copy(Path(folder, _CARD), scratch)  # PEFT adds to a card that is there.
            stock(scratch, selected_adapters=[model.active_adapter], **options)
            for path in [*Path(scratch, model.active_adapter).iterdir(), *Path(scratch).glob(_CARD)]:
                os.replace(path, Path(folder, path.name))

    model.save_pretrained = save
    try:
        yield
    finally:
        del model.save_pretrained
