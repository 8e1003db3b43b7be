"""Signs that are drawn and added where the parameters are: by a kernel of Triton, or else by operations of torch.

Both end at the bits of NumPy's words, which `directions` draws on a CPU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch

from hf_dpzo.distributed.device_sums import TRITON_DEVICES, launch_on, warn_of_triton
from hf_dpzo.zo.philox import CHUNK_SIZE, DOMAIN
from hf_dpzo.zo.sign_table import build_sign_table
from hf_dpzo.zo.torch_philox import draw_words


# The number of chunks that operations of torch do at once, which bounds their memory by some 16 MiB.
CHUNKS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive coordinates of a parameter: all, or those of a shard.

    Args:
        values: the coordinates, `[size]`, changed in place.
        index: the parameter's number.
        start: the number of the first coordinate.
    """

    values: torch.Tensor
    index: int
    start: int = 0


def add_on_device(parts: Sequence[Part], weights: Mapping[int, float], *, seed: int, step: int) -> None:
    """Add `sum_k weights[k] * z_k` to `parts`, in place, all of one type and on one device.

    The sum is taken in float32, in the order of k, and each coordinate is rounded once.

    Args:
        parts: the parts.
        weights: the weight of each direction, by its number; one or more.
        seed: the run's public seed.
        step: the step, from 0.

    >>> from hf_dpzo.zo.directions import Rademacher
    >>> values = torch.zeros(100)
    >>> add_on_device([Part(values=values, index=0)], {3: 1.0}, seed=5, step=2)
    >>> torch.equal(values, Rademacher(seed=5, sizes=[100]).values(index=0, step=2, direction=3))
    True
    """
    parts = [part for part in parts if part.values.numel()]
    if not parts:
        return
    kernel = choose_triton(parts[0].values.device, parts[0].values.dtype)
    if kernel is not None:
        add_by_triton(kernel, parts, weights, seed=seed, step=step)
        return
    for part in parts:
        add_by_torch(part, weights, seed=seed, step=step)


def add_by_triton(
    kernel: ModuleType, parts: Sequence[Part], weights: Mapping[int, float], *, seed: int, step: int
) -> None:
    """Do what `add_on_device` does in one launch, which reads and writes each coordinate once for any number of k."""
    values = parts[0].values
    places = tuple((part.values.data_ptr(), part.index, part.start, part.values.numel()) for part in parts)
    owners, table = _build_table(places, kernel.COORDINATES_PER_PROGRAM, values.device)
    directions, scales = _send_weights(tuple(weights.items()), values.device)
    kinds = {torch.float32: kernel.FLOAT32, torch.float16: kernel.FLOAT16, torch.bfloat16: kernel.BFLOAT16}
    kind = kinds[values.dtype].value
    with launch_on(values.device):
        kernel.add_signs[(len(owners),)](
            owners, table, directions, scales, len(directions), seed, DOMAIN, step, kind=kind
        )


def add_by_torch(part: Part, weights: Mapping[int, float], *, seed: int, step: int) -> None:
    """Do what `add_on_device` does for one part, some chunks at a time."""
    device, stop = part.values.device, part.start + part.values.numel()
    for first in range(part.start // CHUNK_SIZE, math.ceil(stop / CHUNK_SIZE), CHUNKS_AT_ONCE):
        chunks = range(first, min(first + CHUNKS_AT_ONCE, math.ceil(stop / CHUNK_SIZE)))
        total = None
        for direction, weight in weights.items():
            words = draw_words(chunks, (part.index, step), direction, seed=seed, device=device)
            table = torch.from_numpy(build_sign_table(weight)).to(device)
            scaled = table.index_select(0, words.view(torch.uint8).int()).view(-1)
            total = scaled if total is None else total.add_(scaled)
        begin, end = max(part.start, chunks.start * CHUNK_SIZE), min(stop, chunks.stop * CHUNK_SIZE)
        own = total[begin - chunks.start * CHUNK_SIZE : end - chunks.start * CHUNK_SIZE]
        part.values[begin - part.start : end - part.start].add_(own)


@lru_cache
def choose_triton(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the kernel's module if it draws right on `device`, found out by trying; else `None`, with a warning.

    Triton needs a compiler of C, and not every device compiles everything.
    """
    if device.type not in TRITON_DEVICES or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    kernel = _load_triton()
    if kernel is None:
        return None
    values, weights = torch.linspace(-1, 1, kernel.COORDINATES_PER_PROGRAM + 300).to(dtype), {0: 0.3, 5: -1e-3}
    moved = values.to(device, copy=True)
    try:
        add_by_triton(kernel, [Part(values=moved, index=2, start=77)], weights, seed=2**64 - 1, step=3)
        moved = moved.cpu()
    except Exception as error:
        reason = f"it raises {type(error).__name__}"
    else:
        add_by_torch(Part(values=values, index=2, start=77), weights, seed=2**64 - 1, step=3)
        if torch.equal(moved, values):
            return kernel
        reason = "its bits are not those of NumPy"
    warn_of_triton(reason, device, "signs are drawn there")
    return None


@lru_cache
def _load_triton() -> ModuleType | None:
    """Return the module of the kernel, or `None` if Triton cannot be imported."""
    try:
        from hf_dpzo.zo import triton_kernel
    except ImportError:
        return None
    return triton_kernel


@lru_cache(maxsize=8)
def _build_table(
    places: tuple[tuple[int, int, int, int], ...], at_once: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part that each program works on, int32 `[programs]`, and the parts, int64 `[parts, 5]`.

    They hold addresses and numbers alone, so a table that is kept is right for whatever lies at the same places.
    """
    programs = [(start + size - 1) // at_once - start // at_once + 1 for _, _, start, size in places]
    firsts = np.cumsum([0, *programs[:-1]])
    table = np.array([(*place, first) for place, first in zip(places, firsts, strict=True)], dtype=np.int64)
    owners = np.repeat(np.arange(len(places), dtype=np.int32), programs)
    return torch.from_numpy(owners).to(device), torch.from_numpy(table).to(device)


@lru_cache(maxsize=8)
def _send_weights(weights: tuple[tuple[int, float], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the directions, int64 `[K]`, and their weights, float32 `[K]`, on `device`."""
    numbers = torch.tensor([direction for direction, _ in weights], dtype=torch.int64)
    return numbers.to(device), torch.from_numpy(np.array([weight for _, weight in weights], dtype="f4")).to(device)
