"""What is inside the wrappers of PEFT and accelerate, and what kind of model it is."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_dpzo.zo.optimizer import ZOOptimizer


Inputs = Mapping[str, Any]


def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def class_name(model: torch.nn.Module) -> str:
    """The name of the model's class, which FSDP puts its own in front of."""
    return type(model).__name__.removeprefix("FSDP")


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> ZOOptimizer:
    """The zeroth-order optimizer inside accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def drop_labels(inputs: Inputs) -> dict[str, Any]:
    """What a model is given: with labels, it would compute a loss of its own."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def is_prompt_tuned(model: torch.nn.Module) -> bool:
    """Whether what is trained are virtual tokens in front of a row's own."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def accepts_argument(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model's forward takes `argument`."""
    return isinstance(model, PreTrainedModel) and argument in inspect.signature(model.forward).parameters


def is_decoder(model: torch.nn.Module) -> bool:
    """Whether the model is a causal one, whose positions count from its first token."""
    kind = model.config.model_type if isinstance(model, PreTrainedModel) else None
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in causal and kind not in masked
