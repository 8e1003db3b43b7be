"""Compares published weights, tensor by tensor, with those that a replay saved. No file is ever whole in memory."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hf_dpzo.card.files import ADAPTER_CONFIG_FILE, is_weights_file
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.io.foreign import one_sentence
from hf_dpzo.verification.published import list_loaded_files


# The largest drift that another kind of device may cause, relative to a tensor's largest entry.
MAX_DRIFT = 1e-4


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
    """Return the largest drift of the weights that a loader takes from `source` from those in the folder `replayed`.

    It is `None` where no bit differs.

    Raises:
        SourceError: they are larger than the replayed ones, hold a tensor twice, or cannot be read, or there are others
            that a loader may take instead.
    """
    expected = sorted(path for path in replayed.iterdir() if is_weights_file(path.name))
    shards = list_loaded_files(source, adapter=(replayed / ADAPTER_CONFIG_FILE).is_file())
    names = list(shards)
    largest = sum(path.stat().st_size for path in expected) + _SLACK
    if sum(source.sizes[name] for name in names) > largest:
        raise SourceError(f"{', '.join(names[:3])}: together they have more than {largest} bytes, and are not opened.")
    folder = source.fetch(dict.fromkeys(names, largest))
    with one_sentence(f"{', '.join(names[:3])}: it cannot be read", SourceError, remedy="take it anew"):
        published = _index_tensors([folder / name for name in names])
        _check_shards(shards, published)
        drifts = _compare_tensors(published, _index_tensors(expected))
        return max(drifts, key=lambda drift: drift.relative_drift, default=None)


def _check_shards(shards: Mapping[str, Collection[str] | None], published: Mapping[str, Path]) -> None:
    """Raise `SourceError` unless each file of `shards` holds exactly the tensors that the index says."""
    for name, tensors in shards.items():
        held = {tensor for tensor, path in published.items() if path.name == name}
        if tensors is not None and held != set(tensors):
            wrong = min(held ^ set(tensors))
            raise SourceError(f"{name}: the index is wrong about {wrong[:100]!a}; save the weights anew.")


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
    if torch.equal(_read_bytes(published), _read_bytes(replayed)):
        return
    largest = (published.double() - replayed.double()).abs().max().item()
    drift = largest / max(replayed.abs().max().item(), 1e-30) if math.isfinite(largest) else math.inf
    yield WeightDrift(tensor=name, detail=f"an entry differs by {largest:.3g}", relative_drift=drift)


def _read_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, also of one without dimensions, such as the count of batches of a normalization."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
