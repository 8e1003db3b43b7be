"""Frozen bases in few bits whose residual stream is float32, on a CPU.

A CPU with instructions for bfloat16 multiplies matrices in it several times as fast as in float32. All else (norms,
activation functions, sums) is slower there, and where it is rounded, so are losses. So the weights stay as they were
loaded, and are saved and hashed as such; linear layers take float32 and return float32. See `products` for what is
rounded. On other devices, and where gradients flow through int8 weights, layers compute as they always do.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.models.products import (
    has_bfloat16_products,
    has_int8_products,
    is_16_bit,
    is_int8,
    multiply_exactly,
    multiply_integers,
    multiply_rounded,
)
from hf_dpzo.models.unwrap import accepts_argument, unwrap_model


# How far the outputs for made-up tokens may move, relative to their size: more than rounding does, less than a layer.
TOLERANCE = 0.1
# The share of places at which they may not move farther. In 16 bits real models round some places of made-up tokens to
# other outputs altogether; a layer that computes something else moves all, or all but the first of each row.
NEAR_SHARE = 0.25


class Float32Linear(torch.nn.Linear):
    """A linear layer that multiplies 16-bit weights by float32 inputs, and returns float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs for `x` `[..., in]`, float32 `[..., out]`."""
        return multiply_rounded(x, self.weight, self.bias) if is_16_bit(self.weight) else super().forward(x)


class Int8Linear(torch.nn.Linear):
    """A linear layer of int8 weights, whose sums beside float32 are exact. With gradients it is torchao's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs for `x` `[..., in]`, float32 `[..., out]`."""
        is_packed = is_traceable_wrapper_subclass(self.weight) and self.weight.device.type == "cpu"
        if not is_packed or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        integers, scale = self.weight.qdata, self.weight.scale
        if self.weight.dtype == torch.bfloat16 and has_bfloat16_products():
            # Of a base that is in bfloat16 otherwise, which holds all integers of 8 bits.
            product = multiply_rounded(x, integers.to(torch.bfloat16), None) * scale.flatten().float()
            return product if self.bias is None else product + self.bias.float()
        return multiply_integers(x, integers, scale, self.bias)


class Float32Head(torch.nn.Linear):
    """A linear layer above the last hidden states, whose 16-bit weights are unpacked, so that logits are float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits for `x` `[..., in]`, float32 `[..., out]`."""
        return multiply_exactly(x, self.weight, self.bias) if is_16_bit(self.weight) else super().forward(x)


class Float32Conv1D(Conv1D):
    """GPT-2's linear layer, whose weights are transposed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs for `x` `[..., in]`, float32 `[..., out]`."""
        return multiply_rounded(x, self.weight.t(), self.bias) if is_16_bit(self.weight) else super().forward(x)


class Float32LayerNorm(torch.nn.LayerNorm):
    """A layer norm of float32 inputs. torch has none for them with 16-bit weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the normalized `input` `[..., *shape]`, float32."""
        if not is_16_bit(self.weight):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), bias, self.eps)


class Float32RMSNorm(torch.nn.RMSNorm):
    """The same for torch's own norm without a mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized `x` `[..., *shape]`, float32."""
        if not is_16_bit(self.weight):
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


_KINDS = {
    torch.nn.Linear: Float32Linear,
    Conv1D: Float32Conv1D,
    torch.nn.LayerNorm: Float32LayerNorm,
    torch.nn.RMSNorm: Float32RMSNorm,
}


def keep_residual_in_float32(model: torch.nn.Module) -> bool:
    """Let a base in few bits on a CPU compute with a float32 residual stream, and return whether it now does.

    Names, weights and what is saved stay as they are; layers' classes become subclasses, and modules that hold other
    matrices get hooks at which float32 is rounded to their type and back. Whether an architecture allows this is tried
    on made-up tokens. One that fails, or of which the outputs move too far, is left as it was loaded, as is a float32
    model, a model that is sharded, and one that takes no tokens.

    >>> keep_residual_in_float32(torch.nn.Linear(1, 1))
    False
    """
    base = unwrap_model(model)
    if any(type(module) in (*_KINDS.values(), Float32Head, Int8Linear) for module in base.modules()):
        return True
    exchanged = _list_layers(base) if isinstance(base, PreTrainedModel) and not is_sharded(base.parameters()) else {}
    bounded = _list_bounded(base, exchanged) if exchanged else []
    if not exchanged:
        return False
    stock = _evaluate_tokens(base)
    undo = ExitStack()
    for module, kind in exchanged.items():
        undo.callback(setattr, module, "__class__", type(module))
        module.__class__ = kind
    for module in bounded:
        undo.callback(module.register_forward_pre_hook(_round_inputs, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(_widen_outputs).remove)
    if _is_near(stock, _evaluate_tokens(base)):
        return True
    undo.close()
    return False


def _list_layers(base: PreTrainedModel) -> dict[torch.nn.Module, type[torch.nn.Module]]:
    """Return the layers whose classes are exchanged, and their new classes."""
    body = set(base.base_model.modules())
    layers = {}
    for module in base.modules():
        kind = _KINDS.get(type(module))
        if kind is Float32Linear and is_16_bit(module.weight) and module not in body:
            layers[module] = Float32Head
        elif kind is Float32Linear and has_int8_products() and is_int8(module.weight):
            layers[module] = Int8Linear
        elif kind is not None and is_16_bit(module.weight):
            layers[module] = kind
    return layers


def _list_bounded(base: PreTrainedModel, exchanged: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return other modules that compute in 16 bits: embeddings, convolutions, experts.

    A norm's vector of weights alone does not: torch multiplies it by float32 numbers as it is.
    """
    return [
        module
        for module in base.modules()
        if module not in {*exchanged}
        and any(
            is_16_bit(parameter) and (parameter.dim() > 1 or isinstance(module, _NORMS))
            for parameter in module.parameters(recurse=False)
        )
    ]


# Kinds whose kernels take no float32 inputs with 16-bit weights; here those with a `forward` of their own.
_NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._BatchNorm)


def _round_inputs(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Round the float32 inputs of `module` to the type of its parameters."""
    dtype = next((p.dtype for p in module.parameters(recurse=False) if is_16_bit(p)), torch.float32)

    def to_own(value: Any) -> Any:
        is_wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(dtype) if is_wide else value

    return tuple(map(to_own, args)), {name: to_own(value) for name, value in kwargs.items()}


def _widen_outputs(module: torch.nn.Module, args: tuple, output: Any) -> Any:
    """Return the outputs of `module` in float32, where its parameters are on a CPU."""
    if not any(map(is_16_bit, module.parameters(recurse=False))):
        return output
    return _map_floats(lambda tensor: tensor.float(), output)


def _map_floats(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    return tuple(_map_floats(change, item) for item in value) if type(value) is tuple else value


@torch.no_grad()
def _evaluate_tokens(base: PreTrainedModel) -> torch.Tensor | None:
    """Return the first output for transformers' made-up tokens; `None` if the model fails on them."""
    with evaluation_mode(base):
        try:
            inputs = {name: value.to(base.device) for name, value in base.dummy_inputs.items()}
            if accepts_argument(base, "attention_mask"):
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["attention_mask"][0, -1] = 0
            return base(**inputs, return_dict=True)[0].float()
        except Exception:  # A model that fails for any reason is evaluated as it was loaded.
            return None


def _is_near(stock: torch.Tensor | None, changed: torch.Tensor | None) -> bool:
    """Return whether `changed` is there and is near to `stock`, which a 16-bit base below a float32 head has not."""
    if changed is None or stock is None:
        return changed is not None
    if changed.shape != stock.shape:
        return False
    moved = ((changed - stock).norm(dim=-1) / stock.norm(dim=-1)).flatten()
    return bool(moved.quantile(NEAR_SHARE, interpolation="higher") <= TOLERANCE)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, so that nothing is drawn, and restore each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
