"""What no step changes for a row: computed once a run, from that row alone, and put together for each micro-batch."""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
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
    split_inputs,
)
from hf_dpzo.frozen.store import RowStore
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
        store: RowStore | None,
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
            states.append(self._look_up(inputs, place, compute))
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
        return SharedCalls(calls=calls), prefix

    def without_store(self) -> Self:
        """Return what computes each row whenever it comes, such as public rows of a model that is being probed."""
        other = copy.copy(self)
        other.store = None
        return other

    def _look_up(self, inputs: Inputs, place: int, compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Return what is kept of the row at `place`, or else compute it."""
        if self.store is None:
            return compute()
        key = digest_row(inputs, place)
        state = self.store.get(key)
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
        state, prefix, tokens = [], None, inputs["attention_mask"].shape[1]
        if split is not None:
            own = split_inputs(inputs, split.invocation, suffix_length=alone.suffix_length, fixed_shapes=False)
            prefix, inputs = compute_prefix(model, own.prefix), own.suffix
            kept = prefix.cache.layers[self._passed_over :]
            layers = torch.stack([torch.cat([layer.keys, layer.values]) for layer in kept])
            self._key_dtype = layers.dtype
            state = [layers[..., prefix.mask[0].bool(), :]]
        if self._stretches:
            with nullcontext() if prefix is None else continuing(model, prefix):
                returned = _record(model, self._stretches, inputs, call)
            self._forms = [_empty_form(value) for value in returned]
            state += [tensor.squeeze(0) for tensor in list_tensors(returned)]
        state = [tensor.to(self._dtype or tensor.dtype) for tensor in state]
        self.bytes_per_token = max(self.bytes_per_token, sum(tensor.nbytes for tensor in state) / tokens)
        return state


class _Enough(Exception):
    """All that is to be kept has been computed."""


def _record(model: torch.nn.Module, stretches: Sequence[Stretch], inputs: Inputs, call: Evaluate) -> list[Any]:
    """Return what the last layer of each stretch returns, and compute nothing behind it."""

    def stop(*_: Any) -> None:
        raise _Enough

    with recording(stretches) as shared, ExitStack() as hooks:
        # Behind the hook that records.
        hooks.enter_context(stretches[-1].layers[-1].register_forward_hook(stop))
        with suppress(_Enough):
            call(model, inputs)
    firsts = [calls[0] if calls else None for calls in shared.calls.values()]
    if None in firsts:
        raise ValueError("frozen_cache: what layers return for a row can not be kept.")
    return [first.returned for first in firsts]


def digest_row(inputs: Inputs, place: int) -> bytes:
    """Return a digest of what the model reads of one row of a batch, whatever its padding.

    >>> ids, mask = torch.tensor([[7, 8, 0], [0, 7, 8]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> batch = {"input_ids": ids, "attention_mask": mask}
    >>> digest_row(batch, 0) == digest_row(batch, 1)
    True
    """
    mask = inputs["attention_mask"]
    digest = hashlib.blake2b(digest_size=16)
    for name, value in inputs.items():
        if name != "labels" and isinstance(value, torch.Tensor):
            own = value[place][mask[place].bool()] if value.shape == mask.shape else value[place]
            digest.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
            digest.update(own.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _join(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Return the states of rows, each `[tokens, ...]`, as that of a batch, `[batch, tokens, ...]`; padding is zero."""
    joined = states[0].new_zeros((*mask.shape, *states[0].shape[1:]))
    for row, state in enumerate(states):
        joined[row, mask[row].bool()] = state
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


def _fill_form(form: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(form, torch.dtype):
        return next(tensors).to(form)
    return form if form is None else type(form)(_fill_form(part, tensors) for part in form)
