"""Base models whose weights are not float32: how they are recognized, and what keeps their rows apart.

A frozen base may be in 16 bits or quantized; trained parameters are float32. In few bits, a kernel that rounds
differently for another shape moves a row's loss by far more than clipping allows for, so shapes must be public. A
quantizer that scales activations by the whole batch couples its rows in any shape, and is refused by name.
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


# Quantizers that transformers can load and that leave activations as they are.
WEIGHT_ONLY_QUANTIZERS = ("awq", "gguf", "gptq", "hqq", "quanto")


# torchao's names for scaling the activations of each token by themselves.
ROWWISE_GRANULARITIES = ("PerRow", "PerToken")


# The quantizations that a log and a recipe can name.
QUANTIZATIONS = ("int8",)


# The types that a log and a recipe can name, besides float32.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


# A log's name for any other quantization.
UNKNOWN_QUANTIZATION = "other"


# The function by which the stock Trainer's constructor refuses quantized models.
_VALIDATION = "validate_quantization_for_training"


def describe_reduced_precision(model: torch.nn.Module) -> str | None:
    """Describe the first part of `model` that is not float32; return `None` if all that computes is float32.

    >>> describe_reduced_precision(torch.nn.Linear(1, 1)), describe_reduced_precision(torch.nn.Linear(1, 1).bfloat16())
    (None, 'weight: it is torch.bfloat16')
    """
    for name, tensor in model.named_parameters():
        if is_traceable_wrapper_subclass(to_local(tensor)) or not tensor.is_floating_point():
            return f"{name}: it is quantized"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.element_size() < 4:
            return f"{name}: it is {tensor.dtype}"
        # Buffers of positions are int64, and buffers of masks are bool.
        if not tensor.is_floating_point() and tensor.dtype not in (torch.int64, torch.bool):
            return f"{name}: it is {tensor.dtype}"
    return "quantization_config: the base is quantized" if _get_quantization_config(model) else None


def forget_unpacked_quantizer(model: torch.nn.Module) -> None:
    """Remove the mark of GGUF from a model whose weights were all unpacked when it was loaded.

    transformers 5.23 keeps it where no kernel can compute with packed weights, calls the model quantized, and refuses
    to save it. Remove when it does not.
    """
    base = unwrap_model(model)
    quantizer = getattr(base, "hf_quantizer", None)
    is_unpacked = all(parameter.is_floating_point() for parameter in base.parameters())
    if quantizer is not None and _get_quantization_config(model).get("quant_method") == "gguf" and is_unpacked:
        quantizer.remove_quantization_config(base)


def refuse_packed_gguf(model: torch.nn.Module) -> None:
    """Raise `ValueError` for weights of a GGUF file that are still packed: a log, and PEFT, would begin from others.

    transformers 5.23 keeps them packed where a kernel can compute with them, whatever `dtype` asks for.
    """
    quantized = _get_quantization_config(model)
    is_packed = any(not parameter.is_floating_point() for parameter in unwrap_model(model).parameters())
    if quantized and quantized.get("quant_method") == "gguf" and is_packed:
        raise ValueError(
            "model: the weights of its GGUF file are still packed, and whoever loads what is published gets unpacked "
            "ones; load it with quantization_config=transformers.GgufConfig(dequantize=True)."
        )


def refuse_variable_shapes(model: torch.nn.Module, *, fixed: bool) -> None:
    """Raise `ValueError` if `model` is not float32 and the shapes of its batches are not `fixed` by public values."""
    reduced = describe_reduced_precision(model)
    if reduced is not None and not fixed:
        raise ValueError(
            f"{reduced}, and in few bits rows of a batch move each other's losses by its shape; set padded_lengths or "
            "per_device_train_batch_size=1, or load it with dtype=torch.float32."
        )


def refuse_changed_losses(model: torch.nn.Module, loss_change: float) -> None:
    """Raise `ValueError` if `model` is not float32 and public rows moved each other's losses at all."""
    reduced = describe_reduced_precision(model)
    if reduced is not None and loss_change != 0:
        raise ValueError(
            f"{reduced}, and its kernels let rows of a batch move each other's losses by {loss_change:.2g} even in a "
            "fixed shape; set per_device_train_batch_size=1, or load it with dtype=torch.float32."
        )


def refuse_shared_scales(model: torch.nn.Module) -> None:
    """Raise `ValueError` unless the model's quantizer is known to treat the activations of each row by themselves."""
    remedy = "quantize weights alone, as torchao's Int8WeightOnlyConfig does, or load it in float32"
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch.ao.nn.") and "quantized" in kind.__module__:
            raise ValueError(f"{name}: {kind.__name__} of torch.ao scales activations by the whole batch; {remedy}.")
        if kind.__name__ == "Linear8bitLt":
            raise ValueError(f"{name}: LLM.int8 picks outlier columns by the whole batch; {remedy}.")
    for name, parameter in model.named_parameters():
        scaling = getattr(parameter, "act_quant_kwargs", None)  # An attribute of torchao's tensors.
        granularity = type(getattr(scaling, "granularity", None)).__name__
        if scaling is not None and granularity not in ROWWISE_GRANULARITIES:
            raise ValueError(f"{name}: its activations are scaled {granularity}, by the whole batch; {remedy}.")
        if scaling is None and "Activation" in type(parameter).__name__:  # A tensor of an older torchao.
            raise ValueError(f"{name}: {type(parameter).__name__} does not say how activations are scaled; {remedy}.")
    configuration = _get_quantization_config(model)
    method = configuration.get("quant_method")
    is_rowwise = method in WEIGHT_ONLY_QUANTIZERS or method == "torchao" or configuration.get("load_in_4bit")
    if configuration and not is_rowwise:
        raise ValueError(
            f"quantization_config={method}: it is not known to treat each row by itself, for it may scale activations "
            f"by the whole batch; {remedy}."
        )


def describe_loading(model: torch.nn.Module) -> dict[str, str]:
    """Return the type and quantization in which to load the base of `model` again, as a log names them.

    A float32 base gives an empty dict.
    """
    base = unwrap_model(model)
    dtype = base.dtype if isinstance(base, PreTrainedModel) else torch.float32
    loading = {"dtype": str(dtype).removeprefix("torch.")} if dtype in DTYPES.values() else {}
    configuration = _get_quantization_config(model)
    is_packed = any(is_traceable_wrapper_subclass(to_local(p)) or not p.is_floating_point() for p in base.parameters())
    if configuration or is_packed:
        names = [
            name for name in QUANTIZATIONS if is_torchao_available() and configuration == _describe_quantization(name)
        ]
        loading["quantization"] = next(iter(names), UNKNOWN_QUANTIZATION)
    return loading


def build_loading_options(dtype: str | None, quantization: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a type and a quantization that a log or a recipe names.

    Args:
        dtype: a key of `DTYPES`, or `None` for float32.
        quantization: one of `QUANTIZATIONS`, or `None`.

    Raises:
        ValueError: the quantization is not one of `QUANTIZATIONS`, or torchao is not installed.
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
    return {**options, "quantization_config": _build_torchao_config(quantization)}


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors inside `tensor`, in order: of a quantized one packed bits, scales and zero points."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from inner_tensors(getattr(tensor, name))


@contextmanager
def skipped_stock_validation() -> Iterator[None]:
    """Let the stock Trainer's constructor accept quantized models that backpropagation cannot cross.

    It refuses quantizers whose `is_trainable` is false, which matters only to a backward pass. `refuse_model` refuses
    what cannot be perturbed. Remove when transformers checks `is_trainable` only before a backward pass.
    """
    stock = getattr(transformers.trainer, _VALIDATION)
    setattr(transformers.trainer, _VALIDATION, lambda model: None)
    try:
        yield
    finally:
        setattr(transformers.trainer, _VALIDATION, stock)


def _get_quantization_config(model: torch.nn.Module) -> Mapping[str, Any]:
    """Return how transformers quantized the base; an empty mapping if it did not."""
    base = unwrap_model(model)
    configuration = base.config.to_dict().get("quantization_config") if isinstance(base, PreTrainedModel) else None
    if not configuration:
        return {}
    return _name_method(configuration if isinstance(configuration, Mapping) else configuration.to_dict())


def _name_method(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return `configuration` with the name of its method instead of a member of an enumeration."""
    method = configuration.get("quant_method")
    return {**configuration, "quant_method": getattr(method, "value", method)}


def _describe_quantization(quantization: str) -> dict[str, Any]:
    return _name_method(_build_torchao_config(quantization).to_dict())


def _build_torchao_config(quantization: str) -> TorchAoConfig:
    # Imported here, because torchao is optional and takes seconds to import.
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig({"int8": Int8WeightOnlyConfig}[quantization]())
