"""Activated LoRA: an adapter that computes from a row's last invocation on, and nowhere else (Greenewald et al. 2025).

The tokens before the invocation are those of the base model, to the last bit. A row without an invocation is the base.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, TaskType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from hf_dpzo.models.unwrap import unwrap_model


def find_invocation(model: torch.nn.Module) -> tuple[int, ...] | None:
    """Return the tokens that activate the adapter of `model` that a run trains; `None` if it is always active.

    >>> find_invocation(torch.nn.Linear(2, 2)) is None
    True
    """
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    config = inner.active_peft_config if isinstance(inner, PeftModel) else None
    if not isinstance(config, LoraConfig) or config.alora_invocation_tokens is None:
        return None
    return tuple(config.alora_invocation_tokens)


def locate_invocation(input_ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Return the place of the first token of each row's last invocation, int64 `[batch]`; -1 for a row without one.

    PEFT's own search gives the same places, counted from the end, by a loop over rows and places.

    Args:
        input_ids: the tokens of the rows, `[batch, tokens]`.
        tokens: the tokens of the invocation, one at least.

    >>> locate_invocation(torch.tensor([[5, 6, 5, 6], [1, 5, 6, 7], [6, 5, 5, 7]]), [5, 6]).tolist()
    [2, 1, -1]
    """
    starts = input_ids.shape[1] - len(tokens) + 1
    if starts < 1:
        return torch.full((len(input_ids),), -1, device=input_ids.device)
    begins = torch.ones(len(input_ids), starts, dtype=torch.bool, device=input_ids.device)
    for offset, token in enumerate(tokens):
        begins &= input_ids[:, offset : offset + starts] == token
    places = torch.arange(starts, device=input_ids.device)
    return torch.where(begins, places, -1).amax(dim=1)


def hold_invocation(inputs: Mapping[str, Any], tokens: Sequence[int], *, rows: int) -> torch.Tensor:
    """Return whether each row of a batch holds the invocation, bool `[rows]`: in all of its texts, if it has several.

    What is no tensor of tokens is not judged: of such rows the result is `True`.

    Args:
        inputs: a batch as a collator returns it. Of pairs, the second texts come after all of the first ones.
        tokens: the tokens of the invocation.
        rows: the number of rows in the batch.

    >>> pairs = torch.tensor([[5, 1], [5, 2], [3, 5], [3, 3]])
    >>> hold_invocation({"input_ids": pairs}, [5], rows=2).tolist()
    [True, False]
    """
    input_ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not rows or len(input_ids) % rows:
        return torch.ones(rows, dtype=torch.bool)
    return (locate_invocation(input_ids, tokens) >= 0).view(-1, rows).all(dim=0)


def refuse_activation(model: torch.nn.Module) -> None:
    """Raise `ValueError` for an activated adapter whose configuration says that nothing activates it."""
    tokens = find_invocation(model)
    if tokens is None:
        return
    config = model.active_peft_config
    shown = f"alora_invocation_tokens={list(tokens)}"
    if not tokens:
        raise ValueError(f"{shown}: no tokens activate the adapter; name some, or leave the field out.")
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"{shown}: adapters of type {config.peft_type.value} ignore it; use LoraConfig, or leave it out."
        )
    if config.task_type != TaskType.CAUSAL_LM:
        raise ValueError(
            f"{shown}: with task_type={config.task_type} PEFT never activates the adapter, and the model would stay "
            "the base; set task_type='CAUSAL_LM' for a causal language model, or leave alora_invocation_tokens out."
        )
    size = _count_known_tokens(unwrap_model(model))
    wrong = [token for token in tokens if type(token) is not int or not 0 <= token < size]
    if wrong:
        raise ValueError(
            f"{shown}: {wrong[0]!r} is none of the {size:g} tokens that the model knows; pass the numbers that the "
            "tokenizer gives for the invocation."
        )


def _count_known_tokens(model: torch.nn.Module) -> float:
    table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    return table.num_embeddings if isinstance(table, torch.nn.Embedding) else float("inf")


@contextmanager
def as_ordinary(model: torch.nn.Module) -> Iterator[None]:
    """Let the activated adapter of `model` compute at all positions, as an ordinary LoRA with the same weights.

    On keys and values that the base made of the tokens before the invocation, it then computes from the invocation on
    what the activated one does, up to rounding. `torch.func.vmap` can batch it over points; PEFT's activation, an
    addition in place where a mask is set, it can not. A model without an activated adapter computes as before.
    """
    tokens = find_invocation(model)
    if tokens is None:
        yield
        return
    config, adapter = model.active_peft_config, model.active_adapter
    layers = [layer for layer in _list_layers(model) if isinstance(layer.lora_variant.get(adapter), ALoraLinearVariant)]
    variants = [layer.lora_variant.pop(adapter) for layer in layers]
    config.alora_invocation_tokens = None
    try:
        yield
    finally:
        config.alora_invocation_tokens = list(tokens)
        for layer, variant in zip(layers, variants, strict=True):
            layer.lora_variant[adapter] = variant


@contextmanager
def rows_apart(model: torch.nn.Module) -> Iterator[None]:
    """Let activated adapters of `model` compute each row in a shape that no other row decides, and leave no hook.

    PEFT multiplies the activated positions of all rows of a batch together, so that their number, which each row has a
    part in, decides how every row is rounded. Here the adapter computes at all positions and is added at the activated
    ones: the same, up to rounding. `torch.func.vmap` can batch it over points.

    A model without an activated adapter computes as before.
    """
    if not _has_activated(model):
        yield
        return
    layers = _list_layers(model)
    # Of all adapters: a reference may be another one than that which is trained.
    variants = [
        (layer.lora_variant, adapter, variant)
        for layer in layers
        for adapter, variant in layer.lora_variant.items()
        if isinstance(variant, ALoraLinearVariant)
    ]
    for held, adapter, _ in variants:
        held[adapter] = MaskedActivation()
    try:
        with leaving_no_hook(model):
            yield
    finally:
        for held, adapter, variant in variants:
            held[adapter] = variant


@contextmanager
def leaving_no_hook(model: torch.nn.Module) -> Iterator[None]:
    """Take away the hooks that calls of `model` inside the context leave in activated layers.

    PEFT 0.21 tells each layer by a hook where a row is activated, and takes the hooks away behind a `yield` without
    `finally`: a call that fails, or is stopped on the way, leaves them, one more in each layer, and `get_base_model()`
    computes with them from then on. Remove this when PEFT does it.
    """
    layers = _list_layers(model) if _has_activated(model) else []
    hooks = [set(layer._forward_pre_hooks) for layer in layers]
    try:
        yield
    finally:
        for layer, own in zip(layers, hooks, strict=True):
            for key in set(layer._forward_pre_hooks) - own:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _has_activated(model: torch.nn.Module) -> bool:
    """Return whether any adapter of `model` is activated by tokens."""
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    configs = inner.peft_config.values() if isinstance(inner, PeftModel) else ()
    return any(isinstance(config, LoraConfig) and config.alora_invocation_tokens for config in configs)


class MaskedActivation(ALoraLinearVariant):
    """PEFT's activation, in shapes that depend on the shape of the batch alone. See `rows_apart`."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Return `result`, `[batch, tokens, features]`, with the adapter added where a row is activated.

        Args:
            module: the layer.
            active_adapter: the adapter.
            x: the input of the layer, `[batch, tokens, features]`.
            result: what the layer computes without the adapter.
            options: as `alora_offsets` the number of activated tokens at the end of each row; `None` for none.

        Raises:
            ValueError: the layer does not get the tokens of each row apart, without which PEFT activates nothing.
        """
        offsets = options.get("alora_offsets")
        if offsets is None:
            return result
        if len(offsets) != len(result):
            raise ValueError(
                f"target_modules: the layer from {x.shape[-1]} to {result.shape[-1]} numbers gets the tokens of all "
                "rows as one list, in which PEFT activates nothing; name others, such as those of the attention."
            )
        tokens = result.shape[1] if result.ndim == 3 else 1
        counts = torch.tensor([min(offset or 0, tokens) for offset in offsets], device=result.device)
        is_active = torch.arange(tokens, device=result.device) >= tokens - counts[:, None]
        first, second = module.lora_A[active_adapter], module.lora_B[active_adapter]
        inputs = module.lora_dropout[active_adapter](x.to(first.weight.dtype))
        added = second(first(inputs)) * module.scaling[active_adapter]
        return torch.where(is_active.view(*result.shape[:-1], 1), (result + added).to(result.dtype), result)


def _list_layers(model: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
