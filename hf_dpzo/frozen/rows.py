"""What no step changes for a row: computed once a run, and put together for each micro-batch."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, Self

import torch

from hf_dpzo.data.collation import LogicalBatchCollator, MicroBatch
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.frozen.calls import Call, SharedCalls, recording
from hf_dpzo.frozen.digest import name_rows
from hf_dpzo.frozen.layers import Stretch, list_tensors
from hf_dpzo.frozen.prefix import (
    Prefix,
    PrefixCache,
    PrefixLayer,
    SplitInputs,
    compute_prefix,
    continuing,
    find_extent,
    split_inputs,
)
from hf_dpzo.frozen.remembered import RepeatedStore
from hf_dpzo.frozen.store import RowStore
from hf_dpzo.models.activation import leaving_no_hook
from hf_dpzo.models.stopping import stopped_behind
from hf_dpzo.models.unwrap import Inputs


Evaluate = Callable[[torch.nn.Module, Inputs], Any]
Key = bytes | int


# Rows are read together if those of a step fill so many micro-batches. Where fewer are new, most of a public shape
# would be filled in vain, and a row alone takes less.
FILLED_SHAPES = 4


class RowWork:
    """Computes what frozen layers return for rows, and keeps it in a store.

    A row is known by its content. Guarantee: what is kept of it is a function of that row, to the last bit. Rows are
    computed alone and without padding; in public shapes that a step fills several times, many together, as long as no
    row moves a bit of another one.

    Args:
        stretches: the layers that no trained parameter comes before.
        collator: the collator of training.
        prepare: a function that moves inputs to the model's device.
        store: the store; `None` to compute each row whenever it comes.
        dtype: the type in which numbers are kept; `None` for their own.
        rows_per_step: the number of rows of a step on average.
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
        rows_per_step: int = 0,
        passed_over: int = 0,
    ) -> None:
        self._stretches = tuple(stretches)
        self._collate = collator
        # By public numbers alone, so that a row is computed in one way for the whole run.
        self._is_together = collator.has_fixed_shapes and rows_per_step >= FILLED_SHAPES * collator.micro_batch_size
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
        states = self._find_states(model, micro_batch, None if split is None else split.invocation, call)
        prefix = None
        if split is not None:
            kept = [state[0].to(self._key_dtype) for state in states]
            prefix = join_prefixes(kept, split.prefix["attention_mask"], passed_over=self._passed_over)
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

    def read_alone(self) -> None:
        """Compute each row alone from now on, because rows move bits of others even in a public shape."""
        self._is_together = False

    def read_ahead(
        self,
        model: torch.nn.Module,
        micro_batches: Iterable[MicroBatch],
        invocation: tuple[int, ...] | None,
        call: Evaluate,
    ) -> None:
        """Compute and keep what the store does not have of the rows of a step, so that few fill a shape together.

        A row that fails is left out: it fails again, alone, where it is evaluated.
        """
        if not self._is_together or not isinstance(self.store, RowStore) or self.store.is_full:
            return
        known = {key: row for one in micro_batches if one.inputs is not None for key, row in name_rows(one)}
        missing = {key: row for key, row in known.items() if key is not None and key not in self.store}
        with suppress(Exception):
            for key, state in self._compute(model, missing, invocation, call):
                self.store.put(key, state)

    def _find_states(
        self, model: torch.nn.Module, micro_batch: MicroBatch, invocation: tuple[int, ...] | None, call: Evaluate
    ) -> list[list[torch.Tensor]]:
        """Return what is kept of each row of a micro-batch, and compute and keep what is not."""
        if self.store is None:
            computed = dict(self._compute(model, dict(enumerate(micro_batch.rows)), invocation, call))
            return [computed[place] for place in range(len(micro_batch.rows))]
        device = micro_batch.inputs["attention_mask"].device
        named = [(place if key is None else key, row) for place, (key, row) in enumerate(name_rows(micro_batch))]
        states = {key: None if isinstance(key, int) else self.store.get(key, device) for key, _ in named}
        missing = {key: row for key, row in named if states[key] is None}
        for key, state in self._compute(model, missing, invocation, call):
            states[key] = state
            if not isinstance(key, int):  # A row without a digest is computed each time.
                self.store.put(key, state)
        return [states[key] for key, _ in named]

    def _compute(
        self,
        model: torch.nn.Module,
        rows: Mapping[Key, FetchedRow],
        invocation: tuple[int, ...] | None,
        call: Evaluate,
    ) -> Iterator[tuple[Key, list[torch.Tensor]]]:
        """Yield the key of each of `rows`, in an order of its own, and what is to be kept of it."""
        keys = [*rows]
        collate = self._collate if self._is_together else self._collate.with_rows_alone()
        batch = collate([replace(row, slot=place) for place, row in enumerate(rows.values())])["batch"]
        for micro_batch in batch.micro_batches:
            computed = self._compute_together(model, micro_batch, invocation, call)
            for row, state in zip(micro_batch.rows, computed, strict=True):
                yield keys[row.slot], state

    def _compute_together(
        self, model: torch.nn.Module, micro_batch: MicroBatch, invocation: tuple[int, ...] | None, call: Evaluate
    ) -> Iterator[list[torch.Tensor]]:
        """Yield what is to be kept of each row: the keys and values of its prefix, then what stretches return."""
        inputs, prefix = self._prepare(micro_batch.copy_inputs()), None
        if invocation is not None and micro_batch.suffix_length is not None:
            lengths = {"suffix_length": micro_batch.suffix_length, "fixed_shapes": self._is_together}
            split = split_inputs(inputs, invocation, **lengths)
            prefix, inputs = compute_prefix(model, split.prefix), split.suffix
        returned: list[Any] = []
        if self._stretches:
            with nullcontext() if prefix is None else continuing(model, prefix):
                returned = [_drop_others(value) for value in _record(model, self._stretches, inputs, call)]
            self._forms = [_empty_form(value) for value in returned]
        for place in range(len(micro_batch.rows)):
            state = [] if prefix is None else [self._stack_keys(prefix, place)]
            state += [_take_row(tensor, inputs["attention_mask"], place) for tensor in list_tensors(returned)]
            state = [one.to(self._dtype or one.dtype) if one.is_floating_point() else one for one in state]
            self._measure(state, is_split=prefix is not None)
            yield state

    def _stack_keys(self, prefix: Prefix, place: int) -> torch.Tensor:
        """Return the kept keys and values of the prefix of a row, `[layers, 2, heads, tokens, features]`."""
        kept = prefix.cache.layers[self._passed_over :]
        layers = torch.stack([torch.stack([layer.keys[place], layer.values[place]]) for layer in kept])
        self._key_dtype = layers.dtype
        # Up to the invocation, also where the last places before it are not attended to.
        return layers[..., find_extent(prefix.mask[place]).start :, :]

    def _measure(self, state: Sequence[torch.Tensor], *, is_split: bool) -> None:
        """Take down how many bytes a token takes: before an invocation or behind it, whichever takes more."""
        keys, others = (state[:1], state[1:]) if is_split else ([], state)
        before = sum(tensor.nbytes / max(1, tensor.shape[-2]) for tensor in keys)
        behind = sum(tensor.nbytes / max(1, len(tensor)) for tensor in others)
        self.bytes_per_token = max(self.bytes_per_token, before, behind)


def _record(model: torch.nn.Module, stretches: Sequence[Stretch], inputs: Inputs, call: Evaluate) -> list[Any]:
    """Return what the last layer of each stretch returns, and compute nothing behind it."""
    # A call that is stopped leaves hooks, by which the base would compute the prefixes of other rows.
    with leaving_no_hook(model), recording(stretches) as shared, stopped_behind(stretches[-1].layers[-1]):
        call(model, inputs)
    firsts = [calls[0] if calls else None for calls in shared.calls.values()]
    if None in firsts:
        raise ValueError("frozen_cache: what layers return for a row can not be kept.")
    return [first.returned for first in firsts]


def _join(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Return the states of rows, each `[tokens, ...]`, as that of a batch, `[batch, tokens, ...]`; padding is zero."""
    joined = states[0].new_zeros((*mask.shape, *states[0].shape[1:]))
    for row, state in enumerate(states):
        joined[row, find_extent(mask[row])] = state
    return joined


def join_prefixes(states: Sequence[torch.Tensor], mask: torch.Tensor, *, passed_over: int) -> Prefix:
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


def _take_row(tensor: torch.Tensor, mask: torch.Tensor, place: int) -> torch.Tensor:
    """Return what `tensor` `[batch, tokens, ...]` holds for each token of one row of `mask` `[batch, tokens]`."""
    if tensor.shape[:2] != mask.shape:
        raise ValueError("frozen_cache: what layers return for a row can not be kept.")
    return tensor[place, find_extent(mask[place])]


def _fill_form(form: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(form, torch.dtype):
        return next(tensors).to(form)
    return form if form is None else type(form)(_fill_form(part, tensors) for part in form)
