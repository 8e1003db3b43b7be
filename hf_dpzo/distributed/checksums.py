"""A checksum of the bits of tensors: as fast as memory can be read, and no protection against an attacker."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import numpy as np
import torch

from hf_dpzo.distributed.device_sums import TRITON_DEVICES, is_aligned, load_sums, sum_by_triton, warn_of_triton
from hf_dpzo.distributed.threads import divide, run_together


# With fewer numbers than this, which a step reads several times, loading Numba (a second and 160 MiB) does not pay.
MIN_NUMBERS_TO_COMPILE = 20_000_000


# The number of 64-bit words that one weighted sum covers, and of bytes.
WORDS_PER_SUM = 1 << 11
BYTES_PER_SUM = 8 * WORDS_PER_SUM


# The number of sums that torch takes at once, which bounds its temporary copies: 1 MiB on a CPU, 32 MiB elsewhere.
_SUMS_AT_ONCE, _SUMS_AT_ONCE_ON_DEVICE = 64, 1 << 11


# With fewer sums than this for each thread, handing them over takes longer than the work.
_LEAST_SUMS = 64


# Any odd number: multiplying by it loses nothing modulo 2**64.
_FACTOR = 1_000_003


_MODULUS = 1 << 64


# The largest prime below 2**63.
_LARGEST_PRIME = 2**63 - 25


# One odd number for each word of a sum, and two odd numbers that make one for each sum.
_FACTORS = np.random.Philox(key=0).random_raw(WORDS_PER_SUM).view(np.int64) | 1
_MIXERS = (-7046029254386353131, -4658895280553007687)


# The signature of `sum_words`: (words, factors, sums) -> None.
SumKernel = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def checksum(tensors: Iterable[torch.Tensor], *, kernel: SumKernel | None = None) -> int:
    """Return a checksum, below 2**63, of the bits of plain `tensors`, the same on every device.

    The upper half of each word of 64 bits is added to the lower one, since an odd factor would leave a flipped sign of
    the upper one where any other flipped sign cancels it. Then each word has a factor of its own within its sum, and
    each sum one within the total, modulo 2**64. So changes cancel only by chance.

    Args:
        tensors: the tensors, of any type.
        kernel: what `compile_kernel` returned, for tensors on a CPU; without it torch takes the sums.

    >>> checksum([torch.tensor([1.0, 2.0])]) == checksum([torch.tensor([2.0, 1.0])])
    False
    """
    octets = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors)
    return finish_checksum((_take_sums(part, kernel), part.numel()) for part in octets)


def checksum_groups(groups: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    """Return the checksum of each group of plain tensors; on a GPU all sums are taken in one launch.

    >>> checksum_groups([[torch.ones(2)], []]) == [checksum([torch.ones(2)]), checksum([])]
    True
    """
    octets = [[part.detach().contiguous().view(-1).view(torch.uint8) for part in group] for group in groups]
    parts = [part for group in octets for part in group]
    kernel = choose_kernel([tensor for group in groups for tensor in group])
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for part in parts:
        is_elsewhere = part.device.type in TRITON_DEVICES and part.numel() > 0
        if is_elsewhere and is_aligned(part) and choose_triton(part.device) is not None:
            by_device.setdefault(part.device, []).append(part)
    sums: dict[int, torch.Tensor] = {}
    for device, own in by_device.items():
        counts = [count_sums(part.numel()) for part in own]
        taken = sum_by_triton(choose_triton(device), own, counts, _FACTORS)
        sums |= {id(part): found for part, found in zip(own, taken, strict=True)}
    return [
        finish_checksum((sums[id(p)] if id(p) in sums else _take_sums(p, kernel), p.numel()) for p in group)
        for group in octets
    ]


@functools.lru_cache
def choose_triton(device: torch.device) -> ModuleType | None:
    """Return the module of Triton's kernel if its sums are right on `device`, found out by trying; else `None`."""
    triton_sums = load_sums() if device.type in TRITON_DEVICES else None
    if triton_sums is None:
        return None
    octets = torch.from_numpy(_FACTORS.view(np.uint8))[:-4].repeat(3)
    try:
        (found,) = sum_by_triton(triton_sums, [octets.to(device)], [count_sums(len(octets))], _FACTORS)
    except Exception as error:
        reason = f"it raises {type(error).__name__}"
    else:
        if torch.equal(found, _take_sums(octets, None)):
            return triton_sums
        reason = "its sums are not those of torch"
    warn_of_triton(reason, device, "checksums are taken there")
    return None


def finish_checksum(sums: Iterable[tuple[torch.Tensor, int]]) -> int:
    """Return the checksum of several tensors, from the sums of each, int64 `[sums]`, and its number of bytes.

    >>> finish_checksum([(torch.zeros(1, dtype=torch.int64), 8)]) == checksum([torch.zeros(2)])
    True
    """
    total = 0
    for taken, num_bytes in sums:
        factors = _mix_factors(1 << len(taken).bit_length())[: len(taken)]
        if taken.device.type == "cpu":  # A model has hundreds of small tensors, for which NumPy is quicker.
            product = int(np.dot(taken.numpy(), factors))
        else:
            product = int((taken * torch.from_numpy(factors).to(taken.device)).sum())
        total = (total * _FACTOR + product) * _FACTOR + num_bytes
    return total % _MODULUS % _LARGEST_PRIME


@functools.lru_cache
def _mix_factors(count: int) -> np.ndarray:
    """Return an odd factor for each of the first `count` sums, int64 `[count]`."""
    first, second = _MIXERS
    mixed = np.arange(1, 1 + count) * np.int64(first)
    return ((mixed ^ (mixed >> 32)) * np.int64(second)) | 1


def count_sums(num_bytes: int) -> int:
    """Return the number of sums of a tensor of `num_bytes`.

    >>> count_sums(BYTES_PER_SUM + 1)
    2
    """
    return math.ceil(num_bytes / BYTES_PER_SUM)


def sum_words(words: np.ndarray, factors: np.ndarray, sums: np.ndarray) -> None:
    """Write the weighted sum of each run of 2,048 words, modulo 2**64.

    Args:
        words: int64 `[2048 * sums]`.
        factors: int64 `[2048]`.
        sums: int64 `[sums]`, written to.
    """
    for i in range(sums.size):
        total = np.int64(0)
        for j in range(WORDS_PER_SUM):
            word = words[WORDS_PER_SUM * i + j]
            total += (word + (word >> np.int64(32))) * factors[j]
        sums[i] = total


@functools.lru_cache
def compile_kernel() -> SumKernel | None:
    """Return `sum_words` compiled, which takes a tenth of a second, or `None` if Numba cannot be imported."""
    try:
        import numba
    except ImportError:  # Numba raises it too if NumPy is too new for it.
        return None
    return numba.njit("void(int64[::1], int64[::1], int64[::1])", nogil=True)(sum_words)


def choose_kernel(tensors: Sequence[torch.Tensor]) -> SumKernel | None:
    """Return the compiled kernel if there is one and `tensors` are so many numbers that it pays."""
    return compile_kernel() if sum(tensor.numel() for tensor in tensors) >= MIN_NUMBERS_TO_COMPILE else None


def sum_array(octets: np.ndarray, sums: np.ndarray, kernel: SumKernel) -> None:
    """Write the sums of the words in `octets`, uint8 of any length, to `sums`, in this thread."""
    whole = len(octets) // BYTES_PER_SUM
    kernel(octets[: whole * BYTES_PER_SUM].view(np.int64), _FACTORS, sums[:whole])
    if whole < len(sums):
        last = np.zeros(BYTES_PER_SUM, dtype=np.uint8)
        last[: len(octets) - whole * BYTES_PER_SUM] = octets[whole * BYTES_PER_SUM :]
        kernel(last.view(np.int64), _FACTORS, sums[whole:])


def _take_sums(octets: torch.Tensor, kernel: SumKernel | None) -> torch.Tensor:
    """Return the weighted sums of the words in `octets`, int64 `[sums]`, each modulo 2**64."""
    count = count_sums(len(octets))
    sums = torch.empty(count, dtype=torch.int64, device=octets.device)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # A view of larger elements must begin at a multiple of their size.
    if octets.device.type == "cpu" and kernel is not None:
        add_up = sum_array if count < 2 * _LEAST_SUMS else _sum_in_threads
        add_up(octets.numpy(), sums.numpy(), kernel)
        return sums
    whole = len(octets) // BYTES_PER_SUM
    _sum_by_torch(octets[: whole * BYTES_PER_SUM], sums[:whole])
    if whole < count:
        last = octets[whole * BYTES_PER_SUM :]
        _sum_by_torch(torch.nn.functional.pad(last, (0, BYTES_PER_SUM - len(last))), sums[whole:])
    return sums


def _sum_in_threads(octets: np.ndarray, sums: np.ndarray, kernel: SumKernel) -> None:
    def take(share: range) -> None:
        piece = octets[share.start * BYTES_PER_SUM : share.stop * BYTES_PER_SUM]
        sum_array(piece, sums[share.start : share.stop], kernel)

    run_together([functools.partial(take, share) for share in divide(range(len(sums)), least=_LEAST_SUMS)])


def _sum_by_torch(octets: torch.Tensor, sums: torch.Tensor) -> None:
    words = octets.view(torch.int64).view(-1, WORDS_PER_SUM)
    factors = torch.from_numpy(_FACTORS).to(octets.device)
    is_on_cpu = octets.device.type == "cpu"
    at_once = _SUMS_AT_ONCE if is_on_cpu else _SUMS_AT_ONCE_ON_DEVICE
    for piece, target in zip(words.split(at_once), sums.split(at_once), strict=True):
        mixed = (piece >> 32).add_(piece)
        # On a CPU the product needs no temporary copy. No other device multiplies integer matrices.
        target.copy_(mixed.mv(factors) if is_on_cpu else mixed.mul_(factors).sum(dim=1))
