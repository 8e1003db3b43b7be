"""The sums of `checksums` for many tensors on a GPU at once, where Triton is installed and its kernel is right."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch


# The devices for which Triton compiles, those of AMD among the first.
TRITON_DEVICES = ("cuda", "xpu")


def sum_by_triton(
    kernel: ModuleType, octets: Sequence[torch.Tensor], counts: Sequence[int], factors: np.ndarray
) -> list[torch.Tensor]:
    """Return the sums of each of `octets`, on the CPU, int64 `[counts[i]]`, in one launch.

    Args:
        kernel: the module of the kernel.
        octets: the bytes of each tensor, on one device, that `is_aligned`.
        counts: the number of sums of each.
        factors: the factors of words, int64 `[2048]`.
    """
    device = octets[0].device
    firsts = np.cumsum([0, *counts[:-1]])
    rows = [(part.data_ptr(), len(part), first) for part, first in zip(octets, firsts, strict=True)]
    owners = np.repeat(np.arange(len(octets), dtype=np.int32), counts)
    sent = [torch.from_numpy(array).to(device) for array in (owners, np.array(rows, dtype=np.int64), factors)]
    sums = torch.empty(len(owners), dtype=torch.int64, device=device)
    if len(owners):
        with launch_on(device):
            kernel.sum_words[(len(owners),)](*sent, sums)
    return list(sums.cpu().split(list(counts)))


def is_aligned(octets: torch.Tensor) -> bool:
    """Return whether the kernel can read `octets`, as words of 32 bits."""
    return len(octets) % 4 == 0 and octets.data_ptr() % 4 == 0


def launch_on(device: torch.device) -> AbstractContextManager:
    """Return a context in which Triton launches on `device`."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def warn_of_triton(reason: str, device: torch.device, instead: str) -> None:
    """Warn that operations of torch do what a kernel of Triton would do faster."""
    warnings.warn(
        f"triton: {reason} on {device}, so {instead} by operations of torch, which takes longer; install the Triton "
        "that the installed torch asks for, and a compiler of C.",
        stacklevel=3,
    )


@lru_cache
def load_sums() -> ModuleType | None:
    """Return the module of the kernel, or `None` if Triton cannot be imported."""
    try:
        from hf_dpzo.distributed import triton_sums
    except ImportError:
        return None
    return triton_sums
