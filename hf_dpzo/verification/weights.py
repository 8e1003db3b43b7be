"""Compares published weights, tensor by tensor, with those that a replay saved. No file is ever whole in memory."""

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


# The largest drift that another kind of device may cause, relative to a tensor's largest entry.
MAX_DRIFT = 1e-4


# Fields that depend on versions or on loading, or that were set from the tokenizer when training began.
_IGNORED = (
    *("_name_or_path", "transformers_version", "peft_version", "inference_mode", "runtime_config"),
    *("eos_token_id", "bos_token_id", "use_cache"),
)


# Fields of an adapter that name modules, by a list or by a pattern.
_MODULES = ("target_modules", "exclude_modules", "feedforward_modules")


# The bytes by which published files may exceed replayed ones, for example in their headers.
_SLACK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WeightDrift:
    """The difference between a published tensor and the replayed one.

    Args:
        tensor: the tensor's name.
        detail: how it differs, in words.
        relative_drift: the largest difference of an entry, relative to the tensor's largest entry; infinite where
            the two cannot be compared.
    """

    tensor: str
    detail: str
    relative_drift: float


def compare_weights(source: Source, replayed: Path) -> WeightDrift | None:
    """Return the largest drift of the weights in `source` from those in the folder `replayed`.

    It is `None` where no bit differs.

    Raises:
        SourceError: they are larger than the replayed ones, hold a tensor twice, or cannot be read.
    """
    names = [name for name in source.sizes if is_weights_file(name)]
    expected = sorted(path for path in replayed.iterdir() if is_weights_file(path.name))
    largest = sum(path.stat().st_size for path in expected) + _SLACK
    if sum(source.sizes[name] for name in names) > largest:
        raise SourceError(f"{', '.join(names[:3])}: together they have more than {largest} bytes, and are not opened.")
    folder = source.fetch(dict.fromkeys(names, largest))
    try:
        drifts = _compare_tensors(_index_tensors([folder / name for name in names]), _index_tensors(expected))
        return max(drifts, key=lambda drift: drift.relative_drift, default=None)
    except SafetensorError as error:
        raise SourceError(f"{', '.join(names)}: it cannot be read ({error}); take it anew.") from None


def compare_configurations(source: Source, replayed: Path, *, base: str, revision: str | None) -> list[str]:
    """List the differences between the configurations in `source` and those in the folder `replayed`.

    Args:
        source: the published files.
        replayed: the folder that the replayed model was saved to.
        base: the base model's name, which an adapter must state.
        revision: the base model's commit, which an adapter may state.
    """
    differences = []
    for name in CONFIG_FILES:
        if not (replayed / name).is_file():
            differences += [f"{name}: the log leads to none"] if name in source.sizes else []
            continue
        published = _drop_ignored(source.read_json(name))
        wanted = _drop_ignored(json.loads((replayed / name).read_text(encoding="utf-8")))
        if "base_model_name_or_path" in wanted and isinstance(published, dict):
            wanted["base_model_name_or_path"] = base  # The replay states the path that it was loaded from.
            wanted["revision"] = revision if published.get("revision") == revision else None
            # The modules that a pattern matches follow from the names of the tensors, which are compared anyway.
            patterns = {key for key in _MODULES if isinstance(published.get(key), str)}
            published = {key: value for key, value in published.items() if key not in patterns}
            wanted = {key: value for key, value in wanted.items() if key not in patterns}
        differences += compare_json(published, wanted, name)
    return differences


def _drop_ignored(configuration: Any) -> Any:
    if not isinstance(configuration, dict):
        return configuration
    return {name: _sort_names(value) for name, value in configuration.items() if name not in _IGNORED}


def _sort_names(value: Any) -> Any:
    """Sort a list of names, each once: PEFT saves sets in any order, and may add modules to save twice."""
    is_names = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return sorted(set(value)) if is_names else value


def _index_tensors(paths: list[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is not a dictionary.
                if name in files:
                    raise SourceError(f"{name:.100}: it is in {files[name].name} and in {path.name}; remove one.")
                files[name] = path
    return files


def _compare_tensors(published: dict[str, Path], replayed: dict[str, Path]) -> Iterator[WeightDrift]:
    for name in sorted({*published, *replayed}):
        if name not in published or name not in replayed:
            detail = "it is missing" if name not in published else "the log leads to no such tensor"
            yield WeightDrift(tensor=name, detail=detail, relative_drift=math.inf)
            continue
        with safe_open(published[name], framework="pt") as file, safe_open(replayed[name], framework="pt") as wanted:
            form = _describe_form(file, name)
            wanted_form = _describe_form(wanted, name)
            if form != wanted_form:
                detail = f"it is {form}, and not {wanted_form}"
                yield WeightDrift(tensor=name, detail=detail, relative_drift=math.inf)
                continue
            yield from _compare_values(name, file.get_tensor(name), wanted.get_tensor(name))


def _describe_form(file: Any, name: str) -> str:
    tensor = file.get_slice(name)
    return f"{tensor.get_dtype()} {tensor.get_shape()}"


def _compare_values(name: str, published: torch.Tensor, replayed: torch.Tensor) -> Iterator[WeightDrift]:
    if torch.equal(published.contiguous().view(torch.uint8), replayed.contiguous().view(torch.uint8)):
        return
    largest = (published.double() - replayed.double()).abs().max().item()
    drift = largest / max(replayed.abs().max().item(), 1e-30) if math.isfinite(largest) else math.inf
    yield WeightDrift(tensor=name, detail=f"an entry differs by {largest:.3g}", relative_drift=drift)
