"""The description of an adapter in a log.

PEFT's configurations can import modules, load tokenizers, match names by any regular expression, and allocate without
bound. So a log describes an adapter without patterns, and a replay takes from an untrusted log only what
`schemas/adapters.json` lists. Everything else has the default of PEFT's own class.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from hf_dpzo.io.strict_json import find_fault
from hf_dpzo.models.adapters import list_adapted_modules
from hf_dpzo.trajectory.header import TrajectoryError


# These describe this machine, the use of the adapter, or the base model, and not the adapter itself.
_EXCLUDED_KEYS = ("runtime_config", "inference_mode", "base_model_name_or_path", "revision", "peft_version")


# PEFT reads names as regular expressions. In a log, only such names are allowed.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def describe_adapter_config(model: PeftModel) -> dict[str, Any]:
    """Return the configuration of the adapter of `model`, in JSON types.

    The names of modules replace the patterns that matched them, so that a replay need not run a pattern.
    """
    config = {name: _plain(value) for name, value in model.active_peft_config.to_dict().items()}
    kept = {name: value for name, value in config.items() if name not in _EXCLUDED_KEYS}
    if isinstance(model.base_model, BaseTuner):
        kept |= _resolve_modules(model, kept) | _resolve_ranks(model.base_model, kept)
    return kept


def build_adapter_config(description: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration that an untrusted log describes.

    Guarantee: building the adapter imports nothing, opens no file, and runs no pattern from the log. What it adds to a
    model is bounded elsewhere; see `BaseModel.check_growth`.

    Raises:
        TrajectoryError: the log asks for a type, or a value of a key, that no log may ask for.
    """
    name = description.get("peft_type")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(name) if isinstance(name, str) else None
    chosen = {key: value for key, value in description.items() if key != "peft_type"}
    if kind is not None:
        defaults = read_defaults(kind)
        # JSON's true and 1 are equal in Python, but they ask for different things.
        chosen = {
            key: value
            for key, value in chosen.items()
            if key not in defaults or type(value) is not type(defaults[key]) or value != defaults[key]
        }
    fault = find_fault({str(name): chosen}, "adapters.json")
    if fault is not None:
        raise TrajectoryError(f"adapter.{fault}; make the adapter yourself, and call replay_onto.")
    return kind(**chosen)


def read_defaults(kind: type[PeftConfig]) -> dict[str, Any]:
    """Return the default of each field of a class of configurations, in JSON types."""
    fields = dataclasses.fields(kind)
    factories = {
        field.name: field.default_factory for field in fields if field.default_factory is not dataclasses.MISSING
    }
    return {
        field.name: _plain(factories[field.name]() if field.name in factories else field.default) for field in fields
    }


def _resolve_modules(model: PeftModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `config` that select modules by pattern, with the modules that matched instead."""
    names = list_adapted_modules(model)
    resolved = {}
    layers = config.get("layers_pattern") or []
    patterns = [layers] if isinstance(layers, str) else layers
    selections = [config.get(name) for name in ("target_modules", "exclude_modules") if name in config]
    has_pattern = any(isinstance(selection, str) for selection in selections)
    if has_pattern or not all(PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
        nothing = dict.fromkeys({"exclude_modules", "layers_to_transform", "layers_pattern"} & set(config))
        resolved = {"target_modules": names, **nothing}
    if "feedforward_modules" in config:
        inner = config["feedforward_modules"]
        # PEFT requires them to be among the target modules, and a list of full names holds no suffixes.
        if isinstance(inner, str) or not set(inner) <= set(resolved.get("target_modules", config["target_modules"])):
            inner = [name for name in names if model.base_model.model.get_submodule(name).is_feedforward]
            resolved |= {"target_modules": names, "feedforward_modules": inner}
    return resolved


def _resolve_ranks(tuner: BaseTuner, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rank_pattern` and `alpha_pattern` of `config`, with the modules that their keys matched as keys."""
    places = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    return {
        name: _resolve_patterns(config[name], places) for name in ("rank_pattern", "alpha_pattern") if config.get(name)
    }


def _resolve_patterns(patterns: Mapping[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """Return `patterns` keyed by the places that they match, unless all are plain names whose order does not matter.

    >>> _resolve_patterns({"q": 4}, ["0.q", "0.v"]), _resolve_patterns({".*v": 2}, ["0.q", "0.v"])
    ({'q': 4}, {'0.v': 2})
    >>> _resolve_patterns({"q": 4, "0.q": 8}, ["0.q", "1.q"])
    {'0.q': 4, '1.q': 4}
    """
    matching = {place: [key for key in patterns if re.match(rf"(.*\.)?({key})$", place)] for place in places}
    if all(PLAIN_NAME.fullmatch(key) for key in patterns) and all(len(keys) < 2 for keys in matching.values()):
        return dict(patterns)
    return {place: patterns[keys[0]] for place, keys in matching.items() if keys}


def _plain(value: Any) -> Any:
    """Return `value` in JSON types."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
