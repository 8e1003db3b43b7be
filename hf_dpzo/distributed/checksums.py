"""A checksum of the bits of tensors: as fast as memory can be read, and no protection against an attacker."""

from collections.abc import Iterable

import torch


# The number of 64-bit words that one weighted sum covers.
_WORDS_PER_SUM = 1 << 11


# The number of bytes that are summed at once on a device whose sums need a temporary copy, which bounds its memory.
_CHUNK_BYTES = 1 << 23


# Any odd number: multiplying by it loses nothing modulo 2**64.
_FACTOR = 1_000_003


_MODULUS = 1 << 64


# The largest prime below 2**63.
_LARGEST_PRIME = 2**63 - 25


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Return a checksum, below 2**63, of the bits of plain `tensors`, the same on every device.

    Every word has an odd factor of its own within its sum, and every sum within the total, modulo 2**64. So changes
    cancel only by chance.

    >>> checksum([torch.tensor([1.0, 2.0])]) == checksum([torch.tensor([2.0, 1.0])])
    False
    """
    total = 0
    for tensor in tensors:
        octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for chunk in octets.split(_CHUNK_BYTES):
            for weighted_sum in _sum_words(chunk):
                total = (total * _FACTOR + weighted_sum) % _MODULUS
        total = (total * _FACTOR + octets.numel()) % _MODULUS
    return total % _LARGEST_PRIME


def _sum_words(octets: torch.Tensor) -> list[int]:
    """Return the weighted sums of the words in `octets`, each modulo 2**64."""
    padding = -len(octets) % (8 * _WORDS_PER_SUM)
    words = torch.nn.functional.pad(octets, (0, padding)) if padding else octets
    if words.storage_offset() % 8:
        words = words.clone()  # A view of larger elements must begin at a multiple of their size.
    words = words.view(torch.int64).view(-1, _WORDS_PER_SUM)
    odd_factors = torch.arange(1, 2 * _WORDS_PER_SUM, 2, device=words.device)
    # On a CPU the product needs no temporary copy. No other device multiplies integer matrices.
    sums = words.mv(odd_factors) if words.device.type == "cpu" else (words * odd_factors).sum(dim=1)
    return sums.tolist()
