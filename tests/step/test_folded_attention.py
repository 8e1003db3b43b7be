"""Attention at several points at once is attention at each, whatever has a dimension of points."""

import pytest
import torch
import torch.nn.functional as F

from hf_dpzo.step.folded_attention import FoldedAttention


POINTS, ROWS, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 4, 5, 7, 8


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    query = torch.randn(POINTS, ROWS, HEADS, QUERIES, WIDTH)
    key, value = torch.randn(2, POINTS, ROWS, HEADS, KEYS, WIDTH)
    return [query, key, value]


def compare(call, *given: torch.Tensor, in_dims: tuple) -> None:
    with FoldedAttention():
        found = torch.func.vmap(call, in_dims=in_dims)(*given)
    alone = [
        call(*(one if at is None else one.select(at, point) for one, at in zip(given, in_dims, strict=True)))
        for point in range(POINTS)
    ]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)])
@pytest.mark.parametrize("shape", [None, (ROWS, 1), (1, 1), (ROWS, HEADS), (HEADS,), ()], ids=str)
@pytest.mark.parametrize("mask_at", [None, 0])
def test_it_is_attention_at_each_point(batched, shape, mask_at):
    given = [one if at == 0 else one[0] for one, at in zip(tensors(), batched, strict=True)]
    if shape is None:
        compare(F.scaled_dot_product_attention, *given, in_dims=batched)
        return
    mask = torch.rand(*([POINTS] if mask_at == 0 else []), *shape, QUERIES, KEYS) > 0.4
    mask[..., 0] = True
    compare(F.scaled_dot_product_attention, *given, mask, in_dims=(*batched, mask_at))


def test_options_mean_what_they_do():
    query, key, value = tensors()
    compare(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), query, key, value, in_dims=(0,) * 3
    )
    compare(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), query, key, value, in_dims=(0,) * 3)
    few = [one[:, :, :2] for one in (key, value)]
    compare(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), query, *few, in_dims=(0,) * 3)


def test_the_dimension_of_points_may_be_any():
    query, key, value = tensors()
    compare(F.scaled_dot_product_attention, query.movedim(0, 2), key, value.movedim(0, 4), in_dims=(2, 0, 4))


def test_masks_of_numbers_are_added():
    mask = torch.randn(POINTS, ROWS, 1, QUERIES, KEYS)
    compare(F.scaled_dot_product_attention, *tensors(), mask, in_dims=(0,) * 4)


def test_torch_still_has_no_batching_rule_for_its_fused_kernel():
    """Remove `FoldedAttention` when this fails."""
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(kernel, "FuncTorchBatched")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", "FuncTorchBatched")
