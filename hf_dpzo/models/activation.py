"""Activated LoRA: an adapter that computes from a row's last invocation on, and nowhere else (Greenewald et al. 2025).

The tokens before the invocation are those of the base model, to the last bit. A row without an invocation is the base.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant


def find_invocation(model: torch.nn.Module) -> tuple[int, ...] | None:
    """Return the tokens that activate the adapter of `model` that a run trains; `None` if it is always active.

    >>> from peft import get_peft_model
    >>> config = LoraConfig(target_modules=["0"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    >>> find_invocation(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    >>> find_invocation(get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config))
    (5, 6)
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
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
def own_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Leave no hook in `model` that a call inside the context put there and did not take away.

    PEFT 0.21 tells each layer by a hook where a row is activated, and takes the hooks away behind a `yield` without
    `finally`: a call that fails leaves them, one more in each layer, and `get_base_model()` computes with them from
    then on. Remove when PEFT removes them itself.
    """
    if find_invocation(model) is None:
        yield
        return
    layers = _list_layers(model)
    hooks = [set(layer._forward_pre_hooks) for layer in layers]
    try:
        yield
    finally:
        for layer, own in zip(layers, hooks, strict=True):
            for key in set(layer._forward_pre_hooks) - own:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _list_layers(model: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
