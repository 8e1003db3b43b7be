"""Compares published configurations with those that a replay saved: as a loader reads them, not as they are written."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedConfig

from hf_dpzo.card.files import ADAPTER_CONFIG_FILE, CONFIG_FILES
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.trajectory.adapters import read_defaults
from hf_dpzo.verification.patterns import SELECTING_FIELDS, expand_selection, list_base_modules


# Fields that depend on versions or on loading, or that were set from the tokenizer when training began.
_IGNORED = (
    *("_name_or_path", "transformers_version", "peft_version", "inference_mode", "runtime_config"),
    *("eos_token_id", "bos_token_id", "use_cache"),
)


def compare_configurations(
    source: Source, replayed: Path, model: torch.nn.Module, *, base: str, revision: str | None
) -> list[str]:
    """List the differences between the configurations in `source` and those in the folder `replayed`.

    Args:
        source: the published files.
        replayed: the folder that the replayed model was saved to.
        model: the replayed model.
        base: the base model's name, which an adapter must state.
        revision: the base model's commit, which an adapter may state.

    Raises:
        SourceError: a configuration cannot be read, or asks for what no honest one does.
    """
    differences = []
    for name in CONFIG_FILES:
        if not (replayed / name).is_file():
            differences += [f"{name}: the log leads to none"] if name in source.sizes else []
            continue
        published = source.read_json(name)
        if not isinstance(published, dict):
            raise SourceError(f"{name}: it holds no object; take it anew.")
        wanted = _drop_ignored(json.loads((replayed / name).read_text(encoding="utf-8")))
        published = _drop_ignored(published)
        if name == ADAPTER_CONFIG_FILE:
            wanted |= {
                "base_model_name_or_path": base,  # The replay states the path that it was loaded from.
                "revision": revision if published.get("revision") == revision else None,
            }
            published, wanted = _sort_names(published), _sort_names(wanted)
            published = _adopt_equal_selection(published, wanted, model)
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[wanted["peft_type"]]
            published = _fill(published, wanted, partial(read_defaults, kind))
        else:
            config = unwrap_model(model).config
            published = _fill(published, wanted, partial(_read_defaults, type(config)))
            wanted = _fill(wanted, published, partial(_read_fields, config))
            published = _adopt_unstated_types(published, wanted)
        differences += compare_json(published, wanted, name)
    return differences


def _fill(
    fields: Mapping[str, Any], others: Mapping[str, Any], read: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return `fields` with those that only `others` have, as `read` gives them: no loader takes them for null."""
    missing = set(others) - set(fields)
    given = read() if missing else {}
    return {**fields, **{field: given.get(field) for field in missing}}


def _adopt_unstated_types(published: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return `published` with the types of `wanted` in parts of a model that state none.

    A model that was put together in Python states none for its parts; loaded again, it states that of its weights.
    """
    filled = dict(published)
    for name, value in published.items():
        other = wanted.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            adopted = {"dtype": other.get("dtype")} if value.get("dtype") is None else {}
            filled[name] = {**_adopt_unstated_types(value, other), **adopted}
    return filled


def _read_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return all fields of `config` in JSON types, also those that are not written because they are the defaults."""
    return json.loads(config.to_json_string(use_diff=False))


def _read_defaults(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    return _read_fields(kind())


def _adopt_equal_selection(
    published: Mapping[str, Any], wanted: Mapping[str, Any], model: torch.nn.Module
) -> Mapping[str, Any]:
    """Return `published` with the selecting fields of `wanted`, if both choose the same modules, and the same for each.

    A log names modules, and PEFT saves the patterns that chose them.
    """
    differing = [field for field in SELECTING_FIELDS if _order(published.get(field)) != _order(wanted.get(field))]
    if not differing or not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        return published
    names, parameters = list_base_modules(model), model.base_model.targeted_parameter_names
    if expand_selection(published, names, parameters) != expand_selection(wanted, names, parameters):
        return published
    kept = {field: value for field, value in published.items() if field not in SELECTING_FIELDS}
    return kept | {field: wanted[field] for field in SELECTING_FIELDS if field in wanted}


def _order(value: Any) -> Any:
    """Return `value` so that the order of its names counts: of several patterns that match, PEFT takes the first."""
    return list(value.items()) if isinstance(value, Mapping) else value


def _drop_ignored(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in configuration.items() if name not in _IGNORED}


def _sort_names(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Sort each list of names, each once: PEFT saves sets in any order, and may add modules to save twice."""
    return {
        name: sorted(set(value))
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        else value
        for name, value in configuration.items()
    }
