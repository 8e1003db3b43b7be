"""The model and the optimizer inside the wrappers of PEFT and accelerate, and the kind of the model."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_dpzo.zo.optimizer import ZOOptimizer


# A micro-batch as the collator returns it: the arguments of the model's forward by name, and perhaps labels.
Inputs = Mapping[str, Any]


def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def class_name(model: torch.nn.Module) -> str:
    """Return the name of the model's class, without the prefix that FSDP adds."""
    return type(model).__name__.removeprefix("FSDP")


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> ZOOptimizer:
    """Return the zeroth-order optimizer inside accelerate's wrapper, or `optimizer` itself."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def drop_labels(inputs: Inputs) -> dict[str, Any]:
    """Return `inputs` without labels, with which a model would compute a loss of its own."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def is_prompt_tuned(model: torch.nn.Module) -> bool:
    """Return whether the adapter trains virtual tokens, which stand in front of a row's own."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def accepts_argument(model: torch.nn.Module, argument: str) -> bool:
    """Return whether the model's forward takes `argument`."""
    return isinstance(model, PreTrainedModel) and argument in inspect.signature(model.forward).parameters


def is_decoder(model: torch.nn.Module) -> bool:
    """Return whether the model is a causal language model, in which positions count from the first token."""
    model_type = model.config.model_type if isinstance(model, PreTrainedModel) else None
    if model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def count_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return how many tokens come before each place of a row, `[batch, tokens]`, so that padding does not count.

    Args:
        mask: which places hold a token, `[batch, tokens]`.

    >>> count_positions(torch.tensor([[0, 1, 1], [1, 1, 0]])).tolist()
    [[0, 0, 1], [0, 1, 1]]
    """
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def find_adapter_parameters(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Return the parameters that an adapter adds to the base model's forward pass; none without an adapter.

    A head that is trained beside it is a copy of the base model's own, and is not among them.
    """
    if not isinstance(model, PeftModel):
        return set()
    kept = {
        p for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper) for p in module.parameters()
    }
    return {parameter for parameter in model.parameters() if parameter.requires_grad} - kept
