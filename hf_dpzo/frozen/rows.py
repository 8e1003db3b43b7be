"""What no step changes for a row: computed once a run, from that row alone, and put together for each micro-batch."""

import copy
import functools
import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch

from hf_dpzo.data.collation import LogicalBatchCollator, MicroBatch
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.frozen.calls import Call, SharedCalls, recording
from hf_dpzo.frozen.layers import Stretch, list_tensors
from hf_dpzo.frozen.prefix import (
    Prefix,
    PrefixCache,
    PrefixLayer,
    SplitInputs,
    compute_prefix,
    continuing,
    find_extents,
    split_inputs,
)
from hf_dpzo.frozen.remembered import RepeatedStore
from hf_dpzo.frozen.store import RowStore
from hf_dpzo.models.stopping import stopped_behind
from hf_dpzo.models.unwrap import Inputs


Evaluate = Callable[[torch.nn.Module, Inputs], Any]


class RowWork:
    """Computes what frozen layers return for rows, one row at a time, and keeps it in a store.

    A row is known by its content, and is computed alone and without padding. So what is kept of it is a function of
    that row, to the last bit, and no other row has a part in it.

    Args:
        stretches: the layers that no trained parameter comes before.
        collator: the collator of training.
        prepare: a function that moves inputs to the model's device.
        store: the store; `None` to compute each row whenever it comes.
        dtype: the type in which numbers are kept; `None` for their own.
        passed_over: the number of the lowest layers whose keys and values are not kept, because they do not run again.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        *,
        collator: LogicalBatchCollator,
        prepare: Callable[[Any], Any],
        store: RowStore | RepeatedStore | None,
        dtype: torch.dtype | None = None,
        passed_over: int = 0,
    ) -> None:
        self._stretches = tuple(stretches)
        # Without public shapes, a row that is alone is not padded.
        self._collate = collator.with_rows_alone()
        self._prepare = prepare
        self.store = store
        self._dtype = dtype
        self._passed_over = passed_over
        # What the last layer of each stretch returned, with types in place of tensors, and the type of keys.
        self._forms: list[Any] = []
        self._key_dtype = torch.float32
        # The most bytes that a row took, for each of its tokens.
        self.bytes_per_token = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether numbers are kept as they are."""
        return self._dtype is None

    def assemble(
        self, model: torch.nn.Module, micro_batch: MicroBatch, inputs: Inputs, split: SplitInputs | None, call: Evaluate
    ) -> tuple[SharedCalls, Prefix | None]:
        """Return what is kept of the rows of a micro-batch, put together as the model would have computed it.

        Args:
            model: the model.
            micro_batch: the micro-batch.
            inputs: its inputs on the model's device.
            split: the same, split at invocations; `None` for rows that are evaluated as a whole.
            call: evaluates the model.
        """
        states = []
        for place, row in enumerate(micro_batch.rows):
            compute = functools.partial(self._compute, model, row, split, call)
            states.append(self._look_up(row.row, inputs, place, compute))
        prefix = None
        if split is not None:
            kept = [state[0].to(self._key_dtype) for state in states]
            prefix = _join_prefixes(kept, split.prefix["attention_mask"], passed_over=self._passed_over)
            states = [state[1:] for state in states]
        mask = (inputs if split is None else split.suffix)["attention_mask"]
        parts = iter([_join(tensors, mask) for tensors in zip(*states, strict=True)])
        returned = [_fill_form(form, parts) for form in self._forms]
        calls = {
            stretch: [Call(received=None, returned=value)]
            for stretch, value in zip(self._stretches, returned, strict=True)
        }
        return SharedCalls(calls=calls, may_run=split is None or not self._passed_over), prefix

    def with_store(self, store: RowStore | RepeatedStore | None) -> Self:
        """Return what does the same with another store, or computes each row whenever it comes."""
        other = copy.copy(self)
        other.store = store
        return other

    def _look_up(
        self, row: Any, inputs: Inputs, place: int, compute: Callable[[], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Return what is kept of `row`, which is at `place` of a batch, or else compute it."""
        if self.store is None:
            return compute()
        key = digest_row(row, inputs, place)
        if key is None:
            return compute()
        state = self.store.get(key, inputs["attention_mask"].device)
        if state is None:
            state = compute()
            self.store.put(key, state)
        return state

    def _compute(
        self, model: torch.nn.Module, row: FetchedRow, split: SplitInputs | None, call: Evaluate
    ) -> list[torch.Tensor]:
        """Return what is to be kept of a row: the keys and values of its prefix, then what stretches return."""
        (alone,) = self._collate([row])["batch"].micro_batches
        inputs = self._prepare(alone.inputs)
        state, prefix = [], None
        if split is not None:
            own = split_inputs(inputs, split.invocation, suffix_length=alone.suffix_length, fixed_shapes=False)
            prefix, inputs = compute_prefix(model, own.prefix), own.suffix
            state = [self._stack_keys(prefix)]
        if self._stretches:
            with nullcontext() if prefix is None else continuing(model, prefix):
                returned = [_drop_others(value) for value in _record(model, self._stretches, inputs, call)]
            self._forms = [_empty_form(value) for value in returned]
            state += [_take_row(tensor, inputs["attention_mask"]) for tensor in list_tensors(returned)]
        state = [tensor.to(self._dtype or tensor.dtype) if tensor.is_floating_point() else tensor for tensor in state]
        self._measure(state, is_split=split is not None)
        return state

    def _stack_keys(self, prefix: Prefix) -> torch.Tensor:
        """Return the kept keys and values of the prefix of one row, `[layers, 2, heads, tokens, features]`."""
        kept = prefix.cache.layers[self._passed_over :]
        layers = torch.stack([torch.cat([layer.keys, layer.values]) for layer in kept])
        self._key_dtype = layers.dtype
        # Up to the invocation, also where the last places before it are not attended to.
        return layers[..., _find_extent(prefix.mask[0]).start :, :]

    def _measure(self, state: Sequence[torch.Tensor], *, is_split: bool) -> None:
        """Take down how many bytes a token takes: before an invocation or behind it, whichever takes more."""
        keys, others = (state[:1], state[1:]) if is_split else ([], state)
        before = sum(tensor.nbytes / max(1, tensor.shape[-2]) for tensor in keys)
        behind = sum(tensor.nbytes / max(1, len(tensor)) for tensor in others)
        self.bytes_per_token = max(self.bytes_per_token, before, behind)


def _record(model: torch.nn.Module, stretches: Sequence[Stretch], inputs: Inputs, call: Evaluate) -> list[Any]:
    """Return what the last layer of each stretch returns, and compute nothing behind it."""
    with recording(stretches) as shared, stopped_behind(stretches[-1].layers[-1]):
        call(model, inputs)
    firsts = [calls[0] if calls else None for calls in shared.calls.values()]
    if None in firsts:
        raise ValueError("frozen_cache: what layers return for a row can not be kept.")
    return [first.returned for first in firsts]


def digest_row(row: Any, inputs: Inputs, place: int) -> bytes | None:
    """Return a digest of the content of a row, and of what a batch holds for each of its tokens, whatever the padding.

    It is of all that the row holds: a loss may give any of it to the model. `None` for a row that has no digest.

    Args:
        row: the row.
        inputs: the batch.
        place: the place of the row in the batch.

    >>> row, ids, mask = {"x": 1}, torch.tensor([[7, 8, 0], [0, 7, 8]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> batch = {"input_ids": ids, "attention_mask": mask}
    >>> one, same, other = digest_row(row, batch, 0), digest_row(row, batch, 1), digest_row({"x": 2}, batch, 0)
    >>> one == same, one == other
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update(pickle.dumps(row))
    except Exception:  # It holds something of a user's own.
        return None
    mask = inputs["attention_mask"]
    extent = _find_extent(mask[place])
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == mask.shape:
            own = value[place, extent]
            digest.update(f"{name} {own.dtype} {len(own)} ".encode())
            digest.update(own.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _find_extent(mask: torch.Tensor) -> slice:
    """Return the places of a row, of which `mask` says which are attended to, without the padding around them."""
    begins, ends = find_extents(mask[None])
    return slice(int(begins), int(ends))


def _join(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Return the states of rows, each `[tokens, ...]`, as that of a batch, `[batch, tokens, ...]`; padding is zero."""
    joined = states[0].new_zeros((*mask.shape, *states[0].shape[1:]))
    for row, state in enumerate(states):
        joined[row, _find_extent(mask[row])] = state
    return joined


def _join_prefixes(states: Sequence[torch.Tensor], mask: torch.Tensor, *, passed_over: int) -> Prefix:
    """Return the prefix of a batch from those of its rows, each `[layers, 2, heads, tokens, features]`.

    The layers that are passed over have a placeholder, from which a model may read the number of tokens.
    """
    layers, _, heads, _, features = states[0].shape
    joined = states[0].new_zeros((layers, 2, len(mask), heads, mask.shape[1], features))
    for row, state in enumerate(states):
        joined[:, :, row, :, mask.shape[1] - state.shape[-2] :] = state
    cache = PrefixCache()
    placeholder = joined.new_zeros(()).expand(joined.shape[2:])
    cache.layers = [PrefixLayer(placeholder, placeholder) for _ in range(passed_over)]
    cache.layers += [PrefixLayer(keys, values) for keys, values in joined]
    return Prefix(cache=cache, mask=mask)


def _empty_form(value: Any) -> Any:
    """Return what a layer returned, with the types of its tensors in their place."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if value is None else type(value)(map(_empty_form, value))


def _drop_others(value: Any) -> Any:
    """Return what a layer returned for a row with nothing but states of tokens.

    These have as many dimensions as the first tensor. Attention weights, which some layers return unasked, have one
    more. Whether they are missed shows where this is tried on public rows.
    """
    dimensions = list_tensors(value)[0].ndim

    def drop(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part if part.ndim == dimensions else None
        return part if part is None else type(part)(map(drop, part))

    return drop(value)


def _take_row(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what `tensor` `[1, tokens, ...]` holds for each token of the one row of `mask` `[1, tokens]`."""
    if tensor.shape[:2] != (1, mask.shape[1]):
        raise ValueError("frozen_cache: what layers return for a row can not be kept.")
    return tensor[0, _find_extent(mask[0])]


def _fill_form(form: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(form, torch.dtype):
        return next(tensors).to(form)
    return form if form is None else type(form)(_fill_form(part, tensors) for part in form)
