"""Base models whose weights are not float32: which they are, and what keeps their rows apart.

A frozen base may be in 16 bits, or quantized; what is trained is float32. In few bits a kernel that rounds differently
for another shape moves a row's loss by far more than clipping allows for, so that shapes must be public. A quantizer
that scales activations by a whole batch joins its rows in any shape, and is refused by name.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers.trainer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, TorchAoConfig
from transformers.utils import is_torchao_available

from hf_dpzo.distributed.sharding import to_local
from hf_dpzo.models.unwrap import unwrap_model


# What transformers can load that quantizes weights, and leaves activations as they are.
WEIGHT_ONLY_QUANTIZERS = ("awq", "gguf", "gptq", "hqq", "quanto")


# How activations may be scaled: each token by itself.
ROWWISE_GRANULARITIES = ("PerRow", "PerToken")


# The quantizations that a log and a recipe can name, and the types, beside float32.
QUANTIZATIONS = ("int8",)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


UNKNOWN_QUANTIZATION = "other"


_VALIDATION = "validate_quantization_for_training"


def describe_reduced_precision(model: torch.nn.Module) -> str | None:
    """Return what of `model` is not float32, in words; `None` where all that computes is.

    >>> describe_reduced_precision(torch.nn.Linear(1, 1)), describe_reduced_precision(torch.nn.Linear(1, 1).bfloat16())
    (None, 'weight: it is torch.bfloat16')
    """
    for name, tensor in model.named_parameters():
        if is_traceable_wrapper_subclass(to_local(tensor)) or not tensor.is_floating_point():
            return f"{name}: it is quantized"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.element_size() < 4:
            return f"{name}: it is {tensor.dtype}"
        # Positions are int64, and masks bool.
        if not tensor.is_floating_point() and tensor.dtype not in (torch.int64, torch.bool):
            return f"{name}: it is {tensor.dtype}"
    return "quantization_config: the base is quantized" if _get_quantization_config(model) else None


def refuse_variable_shapes(model: torch.nn.Module, *, fixed: bool) -> None:
    """Raise `ValueError` where shapes are not `fixed` by public things, and `model` is not float32."""
    found = describe_reduced_precision(model)
    if found is not None and not fixed:
        raise ValueError(
            f"{found}, and in few bits rows of a batch move each other's losses by its shape; set padded_lengths or "
            "per_device_train_batch_size=1, or load it with dtype=torch.float32."
        )


def refuse_changed_losses(model: torch.nn.Module, loss_change: float) -> None:
    """Raise `ValueError` where public rows moved each other's losses at all, and `model` is not float32."""
    found = describe_reduced_precision(model)
    if found is not None and loss_change != 0:
        raise ValueError(
            f"{found}, and its kernels let rows of a batch move each other's losses by {loss_change:.2g} even in a "
            "fixed shape; set per_device_train_batch_size=1, or load it with dtype=torch.float32."
        )


def refuse_shared_scales(model: torch.nn.Module) -> None:
    """Raise `ValueError` for a quantizer that is known to scale, or to split, activations by the whole batch."""
    remedy = "quantize weights alone, as torchao's Int8WeightOnlyConfig does, or load it in float32"
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch.ao.nn.") and "quantized" in kind.__module__:
            raise ValueError(f"{name}: {kind.__name__} of torch.ao scales activations by the whole batch; {remedy}.")
        if kind.__name__ == "Linear8bitLt":
            raise ValueError(f"{name}: LLM.int8 picks outlier columns by the whole batch; {remedy}.")
    for name, parameter in model.named_parameters():
        scaled = getattr(parameter, "act_quant_kwargs", None)  # Of torchao's tensors.
        kind = type(getattr(scaled, "granularity", None)).__name__
        if scaled is not None and kind not in ROWWISE_GRANULARITIES:
            raise ValueError(f"{name}: its activations are scaled {kind}, by the whole batch; {remedy}.")
        if scaled is None and "Activation" in type(parameter).__name__:  # Of older versions of torchao.
            raise ValueError(f"{name}: {type(parameter).__name__} does not say how activations are scaled; {remedy}.")
    configuration = _get_quantization_config(model)
    method = configuration.get("quant_method")
    known = method in WEIGHT_ONLY_QUANTIZERS or method == "torchao" or configuration.get("load_in_4bit")
    if configuration and not known:
        raise ValueError(
            f"quantization_config={method}: it is not known to treat each row by itself, for it may scale activations "
            f"by the whole batch; {remedy}."
        )


def describe_loading(model: torch.nn.Module) -> dict[str, str]:
    """How to load the base of `model` again: type and quantization, as a log names them; nothing for float32."""
    base = unwrap_model(model)
    dtype = base.dtype if isinstance(base, PreTrainedModel) else torch.float32
    found = {"dtype": str(dtype).removeprefix("torch.")} if dtype in DTYPES.values() else {}
    configuration = _get_quantization_config(model)
    packed = any(is_traceable_wrapper_subclass(to_local(p)) or not p.is_floating_point() for p in base.parameters())
    if configuration or packed:
        alike = [
            name for name in QUANTIZATIONS if is_torchao_available() and configuration == _describe_quantization(name)
        ]
        found["quantization"] = next(iter(alike), UNKNOWN_QUANTIZATION)
    return found


def build_loading_options(dtype: str | None, quantization: str | None) -> dict[str, Any]:
    """What to pass to `from_pretrained`, for a type and a quantization that a log or a recipe names.

    Raises:
        ValueError: the quantization has no name, or what it needs is not installed.
    """
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype or "", torch.float32)}
    if quantization is None:
        return options
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization={quantization}: it is not one of {', '.join(QUANTIZATIONS)}, which alone can be made again "
            "from a name; build the model, and call replay_onto."
        )
    if not is_torchao_available():
        raise ValueError(f"quantization={quantization}: torchao makes it, and is not there; pip install torchao.")
    return {**options, "quantization_config": _torchao_config(quantization)}


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that `tensor` is made of, in order: of a quantized one packed bits, scales and zero points."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from inner_tensors(getattr(tensor, name))


@contextmanager
def skipped_stock_validation() -> Iterator[None]:
    """Inside, the stock Trainer's constructor takes quantized models that backpropagation can not cross.

    It refuses quantizers whose `is_trainable` is false, which only a backward pass would need; what can not be
    perturbed is refused by this library. Remove when transformers asks where it makes a backward pass.
    """
    stock = getattr(transformers.trainer, _VALIDATION)
    setattr(transformers.trainer, _VALIDATION, lambda model: None)
    try:
        yield
    finally:
        setattr(transformers.trainer, _VALIDATION, stock)


def _get_quantization_config(model: torch.nn.Module) -> Mapping[str, Any]:
    """How transformers quantized the base, with names in place of enumerations; empty where it did not."""
    base = unwrap_model(model)
    found = base.config.to_dict().get("quantization_config") if isinstance(base, PreTrainedModel) else None
    return {} if not found else _plain(found if isinstance(found, Mapping) else found.to_dict())


def _plain(configuration: Mapping[str, Any]) -> dict[str, Any]:
    method = configuration.get("quant_method")
    return {**configuration, "quant_method": getattr(method, "value", method)}


def _describe_quantization(quantization: str) -> dict[str, Any]:
    return _plain(_torchao_config(quantization).to_dict())


def _torchao_config(quantization: str) -> TorchAoConfig:
    # Imported here: it is not a dependency, takes seconds, and is there wherever somebody quantizes with it.
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig({"int8": Int8WeightOnlyConfig}[quantization]())
