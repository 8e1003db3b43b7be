"""Products of float32 activations with weights in few bits, on a CPU.

What is rounded, and what is not:

- bfloat16 weights are multiplied by activations rounded to bfloat16 where the processor has instructions for it.
- Elsewhere 16-bit weights are unpacked to float32 for each product, which loses nothing, and takes little time.
- int8 weights are multiplied by integers that hold 21 bits of each activation. Those sums are exact, so a row's product
  depends neither on its neighbours nor on the shape of the batch.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


# The largest integer of 8 bits of which the negative has 8 bits too.
LARGEST = 127

# How many integers hold an activation: each the part that those before it have left over, 254 times as fine.
LIMBS = 3
FINER = 2 * LARGEST

# With more inputs an integer of 32 bits might not hold a sum.
MAX_INPUTS = 2**31 // 128**2

# The number of a vocabulary's words whose weights are unpacked at once.
WORDS_PER_CHUNK = 2048


def is_16_bit(weight: Any) -> bool:
    """Return whether `weight` is an ordinary tensor of 16-bit floating point numbers on a CPU.

    >>> is_16_bit(torch.zeros(1).half()), is_16_bit(torch.zeros(1)), is_16_bit(None)
    (True, False, False)
    """
    return (
        isinstance(weight, torch.Tensor)
        and not is_traceable_wrapper_subclass(weight)
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.device.type == "cpu"
    )


def is_int8(weight: Any) -> bool:
    """Return whether `weight` is of torchao's kind `Int8WeightOnlyConfig`, one scale a row, on a CPU."""
    if not isinstance(weight, torch.Tensor) or not is_traceable_wrapper_subclass(weight):
        return False
    # Imported here, because torchao is optional; where there is such a tensor, it is imported already.
    if not type(weight).__module__.startswith("torchao.") or weight.device.type != "cpu":
        return False
    from torchao.quantization import Int8Tensor

    return (
        isinstance(weight, Int8Tensor)
        and weight.qdata.dim() == 2
        and weight.qdata.shape[1] <= MAX_INPUTS
        and weight.scale.numel() == len(weight.qdata)
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
        and (weight.zero_point is None or not bool(weight.zero_point.any()))
    )


@cache
def has_bfloat16_products() -> bool:
    """Return whether the processor multiplies bfloat16 numbers by instructions of its own."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@cache
def has_int8_products() -> bool:
    """Return whether the processor adds up products of 8-bit integers by instructions of its own, in 32 bits.

    Without them torch's kernel adds up pairs in 16 bits, in which some sums do not fit.
    """
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_vnni") or able.get("amx_int8"))


def multiply_rounded(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `inputs` `[..., in]` times a 16-bit `weight` `[out, in]`, plus `bias`: float32 `[..., out]`."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    if weight.dtype == torch.bfloat16 and has_bfloat16_products():
        product = F.linear(flat.to(weight.dtype), weight).float()
    else:
        product = F.linear(flat.float(), weight.float())
    return _finish(product, inputs, bias)


def multiply_exactly(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return what `multiply_rounded` does, computed in float32: for logits, of which small differences matter."""
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    product = torch.cat([F.linear(flat, chunk.float()) for chunk in weight.split(WORDS_PER_CHUNK)], dim=-1)
    return _finish(product, inputs, bias)


def multiply_integers(
    inputs: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `inputs` `[..., in]` times int8 `integers` `[out, in]` times `scale` `[out]`, plus `bias`: float32.

    Guarantee: the product of each of the rows of `inputs` is the same to the bit in whatever batch.
    """
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    return _finish(_IntegerProduct.apply(flat, integers, scale.flatten().float()), inputs, bias)


def _finish(product: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = product if bias is None else product + bias.float()
    return product.view(*inputs.shape[:-1], product.shape[-1])


class _IntegerProduct(torch.autograd.Function):
    """A product of rows, which `torch.func.vmap` turns into one product of more rows. It has no derivative."""

    @staticmethod
    def forward(rows: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # Clamped, so that a row of zeros can be divided by it.
        unit = (rows.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        rest, total = rows / unit, torch.zeros(len(rows), len(integers))
        for limb in range(LIMBS):
            whole = rest.round()
            # Made float32 first: adding integers to float32 numbers takes longer.
            total.add_(torch._int_mm(whole.to(torch.int8), integers.t()).float(), alpha=FINER**-limb)
            rest.sub_(whole).mul_(FINER)
        return total.mul_(unit).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep nothing: there is no backward pass."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, rows: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> tuple:
        """Return the products of all points at once, and the place of their dimension."""
        every = rows.movedim(in_dims[0], 0)
        product = _IntegerProduct.apply(every.flatten(0, 1), integers, scale)
        return product.unflatten(0, every.shape[:2]), 0
