"""Weights in files, compared tensor by tensor with those that a replay saved. No file is ever whole in memory."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_dpzo.card.files import CONFIGURATIONS, is_weights
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.io.strict_json import differences


# Relative to a tensor's largest entry: how far another kind of device may lead.
LARGEST_DRIFT = 1e-4


# Of versions and of loading, or set from the tokenizer when training began.
_IGNORED = (
    *("_name_or_path", "transformers_version", "peft_version", "inference_mode", "runtime_config"),
    *("eos_token_id", "bos_token_id", "use_cache"),
)


_MODULES = ("target_modules", "exclude_modules", "feedforward_modules")


_SLACK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How weights differ from those that were replayed.

    Args:
        tensor: the one that differs most.
        detail: how it does.
        drift: the largest difference of an entry, relative to the largest entry of its tensor.
    """

    tensor: str
    detail: str
    drift: float


def compare_weights(source: Source, replayed: Path) -> Difference | None:
    """Return how the weights in `source` differ from those in the folder `replayed`; `None` where in no bit.

    Raises:
        SourceError: they are larger than those, or no weights at all.
    """
    names = [name for name in source.sizes if is_weights(name)]
    expected = sorted(path for path in replayed.iterdir() if is_weights(path.name))
    largest = sum(path.stat().st_size for path in expected) + _SLACK
    if sum(source.sizes[name] for name in names) > largest:
        raise SourceError(f"{', '.join(names[:3])}: together they have more than {largest} bytes, and are not opened.")
    folder = source.fetched(dict.fromkeys(names, largest))
    try:
        there, here = _tensors([folder / name for name in names]), _tensors(expected)
        return max(_differing(there, here), key=lambda one: one.drift, default=None)
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
    for name in CONFIGURATIONS:
        if not (replayed / name).is_file():
            found += [f"{name}: the log leads to none"] if name in source.sizes else []
            continue
        there, here = _kept(source.json(name)), _kept(json.loads((replayed / name).read_text(encoding="utf-8")))
        if "base_model_name_or_path" in here and isinstance(there, dict):
            here["base_model_name_or_path"] = base  # It was loaded from wherever it is here.
            here["revision"] = revision if there.get("revision") == revision else None
            # Which modules a pattern means, the names of the tensors tell.
            patterns = {key for key in _MODULES if isinstance(there.get(key), str)}
            there, here = ({key: one[key] for key in one if key not in patterns} for one in (there, here))
        found += differences(there, here, name)
    return found


def _kept(configuration: Any) -> Any:
    if not isinstance(configuration, dict):
        return configuration
    return {name: _as_set(value) for name, value in configuration.items() if name not in _IGNORED}


def _as_set(value: Any) -> Any:
    """PEFT saves sets of names, in any order, and adds modules to save that are there already."""
    names = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(set(value)) if names else value


def _tensors(paths: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary.
                if name in found:
                    raise SourceError(f"{name:.100}: it is in {found[name].name} and in {path.name}; remove one.")
                found[name] = path
    return found


def _differing(there: dict[str, Path], here: dict[str, Path]) -> Iterator[Difference]:
    for name in sorted({*there, *here}):
        if name not in there or name not in here:
            detail = "it is missing" if name not in there else "the log leads to no such tensor"
            yield Difference(tensor=name, detail=detail, drift=math.inf)
            continue
        with safe_open(there[name], framework="pt") as file, safe_open(here[name], framework="pt") as replayed:
            form, wanted = (one.get_slice(name) for one in (file, replayed))
            if (form.get_shape(), form.get_dtype()) != (wanted.get_shape(), wanted.get_dtype()):
                detail = (
                    f"it is {form.get_dtype()} {form.get_shape()}, and not {wanted.get_dtype()} {wanted.get_shape()}"
                )
                yield Difference(tensor=name, detail=detail, drift=math.inf)
                continue
            yield from _of_values(name, file.get_tensor(name), replayed.get_tensor(name))


def _of_values(name: str, there: torch.Tensor, here: torch.Tensor) -> Iterator[Difference]:
    if torch.equal(there.contiguous().view(torch.uint8), here.contiguous().view(torch.uint8)):
        return
    furthest = (there.double() - here.double()).abs().max().item()
    drift = furthest / max(here.abs().max().item(), 1e-30) if math.isfinite(furthest) else math.inf
    yield Difference(tensor=name, detail=f"an entry differs by {furthest:.3g}", drift=drift)
