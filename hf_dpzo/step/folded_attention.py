"""Attention at several probe points at once, on a CPU.

torch 2.13 has no batching rule for its fused kernel, and the plain one writes down all scores and copies all keys. Here
the points become rows of one larger batch, for which the fused kernel computes what it does for each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class FoldedAttention(TorchFunctionMode):
    """Inside this context, `scaled_dot_product_attention` takes all points of `torch.func.vmap` as one batch.

    Remove when torch has a batching rule for the fused kernel on a CPU.

    >>> keys = torch.randn(2, 1, 1, 3, 4)
    >>> with FoldedAttention():
    ...     found = torch.func.vmap(lambda key: F.scaled_dot_product_attention(key, key, key))(keys)
    >>> expected = torch.stack([F.scaled_dot_product_attention(key, key, key) for key in keys])
    >>> torch.allclose(found, expected, atol=1e-6)
    True
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns for its arguments."""
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Take the arguments of `scaled_dot_product_attention`. What draws random numbers is left to the plain kernel."""
    if dropout_p > 0:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa)


class _Attention(torch.autograd.Function):
    """Attention of rows, of which `torch.func.vmap` makes attention of more rows. It has no derivative."""

    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> torch.Tensor:
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep nothing: there is no backward pass."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[torch.Tensor, int]:
        """Return the outputs at all points, and the place of their dimension."""
        query, key, value, mask, *options = args
        points = info.batch_size
        query, key, value = (_lead(one, at, points) for one, at in zip(args[:3], in_dims[:3], strict=True))
        if mask is not None:
            mask = _lead(mask, in_dims[3], points)
            # It may be without the first dimensions, or have a one in the place of rows.
            mask = mask.reshape(points, *[1] * (query.ndim - mask.ndim), *mask.shape[1:])
            mask = mask.expand(points, query.shape[1], *mask.shape[2:]).flatten(0, 1)
        folded = (one.flatten(0, 1) for one in (query, key, value))
        return _Attention.apply(*folded, mask, *options).unflatten(0, (points, -1)), 0


def _lead(tensor: torch.Tensor, place: int | None, points: int) -> torch.Tensor:
    """Return `tensor` with the dimension of points in front, where it may have none."""
    return tensor.expand(points, *tensor.shape) if place is None else tensor.movedim(place, 0)
