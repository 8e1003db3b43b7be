"""The tokens before an activated adapter is invoked: their keys and values are the base's, whatever the probe point.

They are computed once, by the base. A pass then evaluates only the tokens from the invocation on, with an ordinary LoRA
of the same weights, on a cache that holds these keys and values and never grows. Up to rounding that is what the
activated adapter computes (Greenewald et al. 2025).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from hf_dpzo.losses.output_layer import find_output_layer
from hf_dpzo.models.activation import as_ordinary, locate_invocation
from hf_dpzo.models.prefix_cache import PrefixCache, PrefixLayer
from hf_dpzo.models.stopping import stopped_before
from hf_dpzo.models.unwrap import Inputs, accepts_argument, count_positions, unwrap_model


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What a model has computed for the tokens before an invocation. SENSITIVE.

    Args:
        cache: the keys and values.
        mask: which places hold a token, `[batch, tokens]`.
    """

    cache: PrefixCache
    mask: torch.Tensor

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


@dataclass(frozen=True, kw_only=True)
class SplitInputs:
    """A batch that is split at each row's last invocation, with padding only before prefixes and behind suffixes.

    So what a window of attention reaches is what it reaches in the whole row.

    Args:
        prefix: the tokens before the invocation, and their mask, each `[batch, prefix tokens]`.
        suffix: the model's inputs from the invocation on, and what does not belong to tokens.
        invocation: the tokens of the invocation.
    """

    prefix: Inputs
    suffix: Inputs
    invocation: tuple[int, ...]


def split_inputs(inputs: Inputs, invocation: tuple[int, ...], *, suffix_length: int, fixed_shapes: bool) -> SplitInputs:
    """Split a batch at each row's last invocation.

    Args:
        inputs: the batch, with `input_ids` and `attention_mask` `[batch, tokens]`, padded on either side.
        invocation: the tokens of the invocation, which each row holds.
        suffix_length: the number of tokens of a suffix, with padding.
        fixed_shapes: whether shapes are public, so that all places of the batch have room in a prefix.

    >>> inputs = {"input_ids": torch.tensor([[1, 2, 5, 7], [5, 8, 0, 0]]), "labels": torch.tensor([0, 1])}
    >>> inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    >>> split = split_inputs(inputs, (5,), suffix_length=2, fixed_shapes=False)
    >>> split.suffix["input_ids"].tolist(), split.prefix["attention_mask"].tolist()
    ([[5, 7], [5, 8]], [[1, 1], [0, 0]])
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    width = ids.shape[1]
    at = locate_invocation(ids, invocation)[:, None]
    begins, ends = (places[:, None] for places in find_extents(mask))
    prefix_length = width if fixed_shapes else max(1, int((at - begins).max()))
    columns = at - torch.arange(prefix_length, 0, -1, device=ids.device)
    prefix = {
        name: value.gather(1, columns.clamp(min=0))
        for name, value in inputs.items()
        if name != "labels" and _is_per_token(value, ids)
    }
    prefix["attention_mask"] = prefix["attention_mask"].masked_fill(columns < begins, 0)
    columns = at + torch.arange(suffix_length, device=ids.device)
    is_token = columns < ends
    suffix = {
        name: _take(value, columns, is_token, name) if _is_per_token(value, ids) else value
        for name, value in inputs.items()
    }
    return SplitInputs(prefix=prefix, suffix=suffix, invocation=invocation)


def find_extents(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each row of a batch begins, and where it ends, `[batch]` each; a row of padding ends at 0.

    A row may have places in between that are not attended to.

    >>> [places.tolist() for places in find_extents(torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]))]
    [[1, 5], [4, 0]]
    """
    width = mask.shape[1]
    places = torch.arange(width, device=mask.device)
    begins = torch.where(mask.bool(), places, width).amin(dim=1)
    return begins, torch.where(mask.bool(), places + 1, 0).amax(dim=1)


def find_extent(mask: torch.Tensor) -> slice:
    """Return the places of a row, of which `mask` says which are attended to, without the padding around them."""
    begins, ends = find_extents(mask[None])
    return slice(int(begins), int(ends))


@torch.no_grad()
def compute_prefix(model: torch.nn.Module, inputs: Inputs) -> Prefix:
    """Return the keys and values that the base of `model` computes for `inputs`.

    Args:
        model: the model with its activated adapter, which the base is called without.
        inputs: the tokens of the prefix, padded on the left, and their mask.
    """
    base = unwrap_model(model)
    mask = inputs["attention_mask"]
    # A cache without a configuration keeps the keys of all tokens, also where a window slides over them.
    cache = DynamicCache()
    # Nobody reads the logits. For one position of each row torch 2.13 would copy the whole output layer for each row.
    with stopped_before(find_output_layer(model)):
        base(**inputs, **_find_positions(base, mask, 0), past_key_values=cache, use_cache=True)
    kept = PrefixCache()
    kept.layers = [PrefixLayer(layer.keys, layer.values) for layer in cache.layers]
    return Prefix(cache=kept, mask=mask)


@contextmanager
def continuing(model: torch.nn.Module, prefix: Prefix) -> Iterator[None]:
    """Let each call of `model` inside the context go on after `prefix`, with the adapter active at all tokens.

    The calls get the suffixes alone. One that passes an empty cache, as `generate` does, finds the prefix in it, and
    goes on with it.
    """
    base = unwrap_model(model)
    begun: list[Cache] = []

    def go_on(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        length = start = prefix.mask.shape[1]
        changes = {"past_key_values": prefix.cache, "use_cache": False}
        if cache is not None:
            _begin(cache, prefix, begun)
            start, changes = cache.get_seq_length(), {}
        mask = kwargs.get("attention_mask")
        if mask is None:  # `generate` leaves out one that masks nothing.
            mask = torch.ones_like(kwargs["input_ids"][:, :1]).expand(-1, start - length + kwargs["input_ids"].shape[1])
        mask = torch.cat([prefix.mask, mask], dim=1)
        return args, {**kwargs, "attention_mask": mask, **_find_positions(base, mask, start), **changes}

    handle = base.register_forward_pre_hook(go_on, with_kwargs=True)
    try:
        with as_ordinary(model):
            yield
    finally:
        handle.remove()


def _begin(cache: Cache, prefix: Prefix, begun: list[Cache]) -> None:
    """Fill `cache`, a caller's own, with `prefix`, unless it is one of those that have `begun`."""
    if any(cache is one for one in begun):
        return
    if cache.get_seq_length():
        raise ValueError("past_key_values: a call with a filled cache of its own can not go on after a prefix.")
    for number, layer in enumerate(prefix.cache.layers):
        cache.update(layer.keys, layer.values, number)
    begun.append(cache)


def _find_positions(base: torch.nn.Module, mask: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """Return the argument that says how many tokens come before each one from place `start` on, if the model has it."""
    if not accepts_argument(base, "position_ids"):
        return {}
    return {"position_ids": count_positions(mask)[:, start:]}


def _is_per_token(value: Any, ids: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == ids.shape and not value.is_floating_point()


def _take(value: torch.Tensor, columns: torch.Tensor, is_token: torch.Tensor, name: str) -> torch.Tensor:
    """Return what `value` holds at `columns`; where there is no token, what stands for none."""
    taken = value.gather(1, columns.clamp(max=value.shape[1] - 1))
    if name == "labels":
        return taken.masked_fill(~is_token, -100)
    return taken.masked_fill(~is_token, 0) if name == "attention_mask" else taken
