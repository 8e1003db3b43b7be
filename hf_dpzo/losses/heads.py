"""Chooses the loss of a model. A new head is a file beside this one, and a line in `build_head_loss`."""

from collections.abc import Callable

import torch
from transformers.models.auto import modeling_auto

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.losses.sequence_classification import SequenceClassificationLoss
from hf_dpzo.models.unwrap import class_name, unwrap_model


def as_loss(loss: PerExampleLoss | Callable[..., torch.Tensor] | None, model: torch.nn.Module) -> PerExampleLoss:
    """Return `loss` as a `PerExampleLoss`.

    Args:
        loss: a `PerExampleLoss`; a function `(model, inputs) -> [batch]`, which is wrapped; or `None` for the loss that
            belongs to the model's head.
        model: the model to be trained.

    Raises:
        ValueError: `loss` is `None`, and the model's head is not known.
    """
    if loss is None:
        return build_head_loss(model)
    return loss if isinstance(loss, PerExampleLoss) else FunctionLoss(loss)


def build_head_loss(model: torch.nn.Module) -> PerExampleLoss:
    """Return the per-example loss that belongs to the head of `model`.

    Raises:
        ValueError: the head is not known.
    """
    base = unwrap_model(model)
    name = class_name(base)
    if name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return SequenceClassificationLoss(model)
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return CausalLMLoss(model)
    raise ValueError(
        f"model={name}: no per-example loss is known for this head; pass per_example_loss, a function "
        "(model, inputs) that returns one loss for each row, shape [batch]."
    )
