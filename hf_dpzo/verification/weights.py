"""Weights in files, compared tensor by tensor with those that a replay saved. No file is ever whole in memory."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_dpzo.card.files import CONFIG_FILES, is_weights_file
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.io.strict_json import compare_json


# Relative to a tensor's largest entry: how far another kind of device may lead.
MAX_DRIFT = 1e-4


# Of versions and of loading, or set from the tokenizer when training began.
_IGNORED = (
    *("_name_or_path", "transformers_version", "peft_version", "inference_mode", "runtime_config"),
    *("eos_token_id", "bos_token_id", "use_cache"),
)


_MODULES = ("target_modules", "exclude_modules", "feedforward_modules")


_SLACK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WeightDrift:
    """How weights differ from those that were replayed.

    Args:
        tensor: the one that differs most.
        detail: how it does.
        relative_drift: the largest difference of an entry, relative to the largest entry of its tensor.
    """

    tensor: str
    detail: str
    relative_drift: float


def compare_weights(source: Source, replayed: Path) -> WeightDrift | None:
    """Return how the weights in `source` differ from those in the folder `replayed`; `None` where in no bit.

    Raises:
        SourceError: they are larger than those, or no weights at all.
    """
    names = [name for name in source.sizes if is_weights_file(name)]
    expected = sorted(path for path in replayed.iterdir() if is_weights_file(path.name))
    largest = sum(path.stat().st_size for path in expected) + _SLACK
    if sum(source.sizes[name] for name in names) > largest:
        raise SourceError(f"{', '.join(names[:3])}: together they have more than {largest} bytes, and are not opened.")
    folder = source.fetch(dict.fromkeys(names, largest))
    try:
        there, here = _index_tensors([folder / name for name in names]), _index_tensors(expected)
        return max(_compare_tensors(there, here), key=lambda one: one.relative_drift, default=None)
    except SafetensorError as error:
        raise SourceError(f"{', '.join(names)}: it can not be read ({error}); take it anew.") from None


def compare_configurations(source: Source, replayed: Path, *, base: str, revision: str | None) -> list[str]:
    """Return what the configurations in `source` say that those in the folder `replayed` do not.

    Args:
        source: of the published files.
        replayed: where what the log leads to was saved.
        base: the name of the base model, which an adapter must name.
        revision: its commit, which an adapter may name.
    """
    found = []
    for name in CONFIG_FILES:
        if not (replayed / name).is_file():
            found += [f"{name}: the log leads to none"] if name in source.sizes else []
            continue
        there, here = (
            _drop_ignored(source.read_json(name)),
            _drop_ignored(json.loads((replayed / name).read_text(encoding="utf-8"))),
        )
        if "base_model_name_or_path" in here and isinstance(there, dict):
            here["base_model_name_or_path"] = base  # It was loaded from wherever it is here.
            here["revision"] = revision if there.get("revision") == revision else None
            # Which modules a pattern means, the names of the tensors tell.
            patterns = {key for key in _MODULES if isinstance(there.get(key), str)}
            there, here = ({key: one[key] for key in one if key not in patterns} for one in (there, here))
        found += compare_json(there, here, name)
    return found


def _drop_ignored(configuration: Any) -> Any:
    if not isinstance(configuration, dict):
        return configuration
    return {name: _sort_names(value) for name, value in configuration.items() if name not in _IGNORED}


def _sort_names(value: Any) -> Any:
    """PEFT saves sets of names, in any order, and adds modules to save that are there already."""
    names = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(set(value)) if names else value


def _index_tensors(paths: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary.
                if name in found:
                    raise SourceError(f"{name:.100}: it is in {found[name].name} and in {path.name}; remove one.")
                found[name] = path
    return found


def _compare_tensors(there: dict[str, Path], here: dict[str, Path]) -> Iterator[WeightDrift]:
    for name in sorted({*there, *here}):
        if name not in there or name not in here:
            detail = "it is missing" if name not in there else "the log leads to no such tensor"
            yield WeightDrift(tensor=name, detail=detail, relative_drift=math.inf)
            continue
        with safe_open(there[name], framework="pt") as file, safe_open(here[name], framework="pt") as replayed:
            form, wanted = (one.get_slice(name) for one in (file, replayed))
            if (form.get_shape(), form.get_dtype()) != (wanted.get_shape(), wanted.get_dtype()):
                detail = (
                    f"it is {form.get_dtype()} {form.get_shape()}, and not {wanted.get_dtype()} {wanted.get_shape()}"
                )
                yield WeightDrift(tensor=name, detail=detail, relative_drift=math.inf)
                continue
            yield from _compare_values(name, file.get_tensor(name), replayed.get_tensor(name))


def _compare_values(name: str, there: torch.Tensor, here: torch.Tensor) -> Iterator[WeightDrift]:
    if torch.equal(there.contiguous().view(torch.uint8), here.contiguous().view(torch.uint8)):
        return
    furthest = (there.double() - here.double()).abs().max().item()
    drift = furthest / max(here.abs().max().item(), 1e-30) if math.isfinite(furthest) else math.inf
    yield WeightDrift(tensor=name, detail=f"an entry differs by {furthest:.3g}", relative_drift=drift)
