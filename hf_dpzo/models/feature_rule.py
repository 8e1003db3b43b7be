"""The public rule by which a layer's states become features: where they are read, and by what they are scaled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


# A coordinate that is the same in all public texts is not scaled up without bound.
_SMALLEST_SPREAD = 1e-3


@dataclass(frozen=True, kw_only=True)
class Standard:
    """By what public texts have, states are centred and scaled.

    Args:
        center: the mean of each coordinate, `[hidden_size]`.
        scale: one over its standard deviation, `[hidden_size]`.
    """

    center: torch.Tensor
    scale: torch.Tensor


@torch.no_grad()
def measure_standard(read: Callable[[Sequence[int]], torch.Tensor], texts: Sequence[Sequence[int]]) -> Standard:
    """Return by what the states of `texts`, which are PUBLIC, are centred and scaled.

    Args:
        read: a function from a row's tokens to its states, float32 `[1, hidden_size]`.
        texts: the tokens of two or more public texts.

    Raises:
        ValueError: there are fewer.
    """
    if len(texts) < 2:
        raise ValueError(f"texts={len(texts)}: a spread needs two public texts at least, better 64; pass more.")
    found = torch.cat([read(text) for text in texts])
    spread = found.std(dim=0)
    scale = 1 / spread.clamp(min=_SMALLEST_SPREAD * max(spread.mean().item(), torch.finfo(torch.float32).tiny))
    return Standard(center=found.mean(dim=0), scale=scale)


def pool(states: torch.Tensor, mask: torch.Tensor, position: str) -> torch.Tensor:
    """Return the states of each row at its last own token, or their mean over its own tokens, `[batch, hidden_size]`.

    A row without a token of its own has NaN.

    Args:
        states: the states, `[batch, tokens, hidden_size]`.
        mask: ones at a row's own tokens, `[batch, tokens]`, padded on either side.
        position: "last" or "mean".

    >>> states = torch.tensor([[[1.0], [2.0], [4.0]], [[1.0], [2.0], [4.0]]])
    >>> mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    >>> pool(states, mask, "last").tolist(), pool(states, mask, "mean").tolist()
    ([[4.0], [2.0]], [[3.0], [1.5]])
    """
    own = mask.bool()
    count = own.sum(dim=-1, keepdim=True)
    if position == "last":
        places = torch.where(own, torch.arange(mask.shape[-1], device=mask.device), 0).amax(dim=-1)
        pooled = states[torch.arange(len(states), device=states.device), places]
    else:
        pooled = states.masked_fill(~own[:, :, None], 0).sum(dim=1) / count.clamp(min=1)
    return pooled.masked_fill(count == 0, torch.nan)
