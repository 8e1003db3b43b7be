"""The modules that a published adapter's configuration chooses, by names or by patterns, among those of its base.

PEFT reads a name as a regular expression, and a stranger's expression can take longer than the universe lasts. So each
one that is no plain name is first run in a process of its own, which is ended if it takes too long.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key

from hf_dpzo.card.sources import SourceError
from hf_dpzo.trajectory.adapters import PLAIN_NAME


# The fields of an adapter's configuration that choose modules, or set something for some of them.
SELECTING_FIELDS = (
    *("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
)


# The seconds that a stranger's patterns may take. Honest ones take a thousandth.
MAX_SECONDS = 5.0


# The most characters that a pattern may have, and the most patterns.
MAX_PATTERN, MAX_PATTERNS = 4096, 4096


_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    compiled = re.compile(pattern)
    for name in names:
        compiled.match(name), compiled.fullmatch(name)
"""


def expand_selection(config: Mapping[str, Any], names: Sequence[str], parameters: Sequence[str] = ()) -> dict[str, Any]:
    r"""Return what `config` chooses among the modules of these `names`: the modules, their ranks and their alphas.

    Args:
        config: the content of an `adapter_config.json`, which a stranger may have written.
        names: the names of the base model's modules.
        parameters: the names of its parameters that the adapter targets by themselves.

    Raises:
        SourceError: a field has another form than PEFT's, or a pattern takes too long.

    >>> names = ["model.0.q", "model.1.q", "model.1.v"]
    >>> expand_selection({"target_modules": r".*1\.[qv]", "rank_pattern": {"v": 4}}, names)["target_modules"]
    ['model.1.q', 'model.1.v']
    """
    _check_forms(config)
    _try_patterns(config, [*names, *parameters])
    fields = ("exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform", "layers_pattern")
    selection = SimpleNamespace(
        target_modules=config.get("target_modules") or [], **{field: config.get(field) for field in fields}
    )
    targets = [name for name in names if check_target_module_exists(selection, name)]
    places = [*targets, *parameters]
    inner = config.get("feedforward_modules") or []
    return {
        "target_modules": targets,
        "feedforward_modules": [name for name in targets if _is_feedforward(inner, name)],
        **{
            field: {name: patterns[key] for name in places if (key := get_pattern_key(patterns, name)) in patterns}
            for field in ("rank_pattern", "alpha_pattern")
            for patterns in [config.get(field) or {}]
        },
    }


def list_base_modules(model: PeftModel) -> list[str]:
    """List the names that the base model's modules had before the adapter was put into it."""
    tuner = model.base_model
    inner = tuner.model if isinstance(tuner, BaseTuner) else tuner
    return [name for name in dict.fromkeys(_walk(inner, "")) if name]


def _walk(module: Any, name: str) -> Iterator[str]:
    kept = {BaseTunerLayer: "base_layer", AuxiliaryTrainingWrapper: "original_module"}
    wrapped = next((child for kind, child in kept.items() if isinstance(module, kind)), None)
    if wrapped is not None:
        yield from _walk(getattr(module, wrapped), name)
        return
    yield name
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}".lstrip("."))


def _is_feedforward(inner: str | list[str], name: str) -> bool:
    return re.fullmatch(inner, name) is not None if isinstance(inner, str) else any(name.endswith(end) for end in inner)


def _check_forms(config: Mapping[str, Any]) -> None:
    """Raise `SourceError` unless each field has a form that PEFT takes."""
    layers = config.get("layers_to_transform")
    forms = {
        **{field: _is_names(config.get(field)) for field in SELECTING_FIELDS[:3]},
        "layers_pattern": _is_names(config.get("layers_pattern")),
        "layers_to_transform": all(type(layer) is int for layer in (layers if isinstance(layers, list) else [layers]))
        or layers is None,
        **{field: isinstance(config.get(field) or {}, dict) for field in SELECTING_FIELDS[5:]},
    }
    wrong = next((field for field, is_right in forms.items() if not is_right), None)
    if wrong is not None:
        raise SourceError(f"adapter_config.json: its {wrong} has a form that PEFT does not take; take it anew.")


def _is_names(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(name, str) for name in value))
    )


def _try_patterns(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `SourceError` if a pattern in `config` is no pattern, or takes too long on `names`."""
    patterns = [pattern for pattern in _list_patterns(config) if not PLAIN_NAME.fullmatch(pattern[0])]
    if not patterns:
        return
    if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN for pattern, _ in patterns):
        raise SourceError("adapter_config.json: its patterns are longer, or more, than are tried; name the modules.")
    trial = json.dumps([[form.format(pattern) for pattern, form in patterns], list(names)])
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    try:
        subprocess.run(command, input=trial.encode(), capture_output=True, check=True, timeout=MAX_SECONDS)
    except subprocess.SubprocessError:
        raise SourceError(
            f"adapter_config.json: its pattern {patterns[0][0]!a:.60} takes too long, or is none; name the modules."
        ) from None


def _list_patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each pattern in `config`, and the expression that PEFT makes of it."""
    for field in SELECTING_FIELDS[:3]:
        if isinstance(config.get(field), str):
            yield config[field], "{}"
    layers = config.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
    for name in config.get("modules_to_save") or []:
        yield name, r"(^|.*\.){}($|\..*)"
    for field in SELECTING_FIELDS[5:]:
        for pattern in config.get(field) or {}:
            yield pattern, r"(.*\.)?({})$"
