"""NumPy's Philox 4x64-10 in integer operations of torch, for devices without Triton.

Words are int64, whose sums and products wrap as those of uint64 do. Of uint64 itself torch has neither sums nor shifts.
"""

import torch

from hf_dpzo.zo.philox import DOMAIN, SweepAddress


_FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW = 0xFFFFFFFF


# The counts of a chunk that are used, of the 2**32 that it owns. Each gives four words.
_COUNTS_PER_CHUNK = 256


def draw_words(chunks: range, sweep: SweepAddress, direction: int, *, seed: int, device: torch.device) -> torch.Tensor:
    """Return the words of consecutive whole chunks of a parameter, int64 `[1024 * chunks]`, drawn on `device`.

    >>> import numpy as np
    >>> from hf_dpzo.zo.philox import Stream
    >>> words = draw_words(range(2, 3), (7, 5), 3, seed=1, device=torch.device("cpu"))
    >>> bool((words.numpy().view(np.uint64) == Stream(1).seek((2, 7, 3, 5)).random_raw(1024)).all())
    True
    """
    index, step = sweep
    counts = torch.arange(_COUNTS_PER_CHUNK, device=device) + 1  # NumPy counts before it draws.
    starts = torch.arange(chunks.start, chunks.stop, device=device) << 32
    c0 = (starts[:, None] + counts).view(-1)
    c1, c2, c3 = (torch.full_like(c0, _wrap(number)) for number in (index, direction, step))
    k0, k1 = seed, DOMAIN
    for _ in range(10):
        (high0, low0), (high2, low2) = (_multiply(c, f) for c, f in zip((c0, c2), _FACTORS, strict=True))
        c0, c1, c2, c3 = high2 ^ c1 ^ _wrap(k0), low2, high0 ^ c3 ^ _wrap(k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) % 2**64, (k1 + _KEY_STEPS[1]) % 2**64
    return torch.stack([c0, c1, c2, c3], dim=1).view(-1)


def _multiply(words: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the upper and the lower 64 bits of the products of unsigned `words` and a `factor`."""
    factor_high, factor_low = factor >> 32, factor & _LOW
    high, low = _shift(words), words & _LOW
    middle = high * factor_low + _shift(low * factor_low)
    upper = high * factor_high + _shift(middle) + _shift((middle & _LOW) + low * factor_high)
    return upper, words * _wrap(factor)


def _shift(words: torch.Tensor) -> torch.Tensor:
    """Return the upper halves of unsigned `words`; a shift alone would carry the sign along."""
    return (words >> 32) & _LOW


def _wrap(number: int) -> int:
    """Return the signed number with the 64 bits of an unsigned one."""
    return number - 2**64 if number >= 2**63 else number
