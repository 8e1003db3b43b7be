"""What frozen layers received and returned while one micro-batch was evaluated, and evaluations that go on from there.

The whole model is called as usual. Only the layers themselves do not compute: the last of them returns what it returned
the first time. Embeddings, masks and positions are made again, so nothing is assumed about an architecture. Before
layers are passed over, what enters the first of them is compared with what entered it the first time, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from hf_dpzo.frozen.layers import Stretch, list_tensors
from hf_dpzo.frozen.prefix import PrefixCache


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a stretch of layers.

    Args:
        received: the tensors that the first layer received; `None` if it is known to receive what it received.
        returned: what the last layer returned.
    """

    received: Sequence[torch.Tensor] | None
    returned: Any


@dataclass(frozen=True, kw_only=True)
class SharedCalls:
    """The calls of all stretches in one evaluation, in their order; `None` for one that cannot be shared. SENSITIVE.

    Args:
        calls: the calls of each stretch.
        may_run: whether the layers may run in further calls.
    """

    calls: dict[Stretch, list[Call | None]] = field(default_factory=dict)
    may_run: bool = True

    @property
    def nbytes(self) -> int:
        """The memory that the calls take."""
        calls = [call for calls in self.calls.values() for call in calls if call is not None]
        return sum(tensor.nbytes for call in calls for tensor in [*(call.received or ()), *list_tensors(call.returned)])


@contextmanager
def recording(stretches: Sequence[Stretch]) -> Iterator[SharedCalls]:
    """Record the calls of `stretches` inside the context.

    What is recorded is what layers compute, before hooks change it: these are called again when layers are passed over.
    """
    shared = SharedCalls(calls={stretch: [] for stretch in stretches})
    with ExitStack() as replaced:
        for stretch, calls in shared.calls.items():
            recorder = _Recorder(calls)
            replaced.enter_context(_replaced_forward(stretch.layers[0], recorder.enter))
            replaced.enter_context(_replaced_forward(stretch.layers[-1], recorder.leave))
        yield shared


@contextmanager
def resuming(shared: SharedCalls) -> Iterator[None]:
    """Let the layers inside the context return what they returned when they were recorded."""
    with ExitStack() as replaced:
        for stretch, calls in shared.calls.items():
            resumption = _Resumption(calls, may_run=shared.may_run)
            for layer in stretch.layers[1:]:
                replaced.enter_context(_replaced_forward(layer, resumption.pass_over))
            replaced.enter_context(_replaced_forward(stretch.layers[0], resumption.enter))
            replaced.enter_context(_replaced_forward(stretch.layers[-1], resumption.leave))
        yield


class _Recorder:
    """Records the calls of one stretch. Its methods stand in for what the first and the last layer compute."""

    def __init__(self, calls: list[Call | None]) -> None:
        self._calls = calls
        self._is_inside = False
        self._received: list[torch.Tensor] | None = None

    def enter(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        # A layer that is given a cache writes into it, so it has to run. Others have no effect but what they return.
        writes = any(
            isinstance(value, Cache) and not isinstance(value, PrefixCache) for value in [*args, *kwargs.values()]
        )
        self._received = None if writes else _copy(list_tensors([args, kwargs]))
        self._is_inside = True
        return forward(*args, **kwargs)

    def leave(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        if self._is_inside:  # And not called once more, by itself.
            is_plain = self._received is not None and _is_plain(output)
            self._calls.append(Call(received=self._received, returned=_copy(output)) if is_plain else None)
        self._is_inside = False
        return output


class _Resumption:
    """Passes over one stretch, call by call."""

    def __init__(self, calls: Sequence[Call | None], *, may_run: bool) -> None:
        self._calls = iter(calls)
        self._may_run = may_run
        self._call: Call | None = None

    def enter(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stand in for the first layer: begin to pass over the stretch if it receives what it received before."""
        self._call = next(self._calls, None)
        before = None if self._call is None else self._call.received
        if before is not None and not _are_equal(before, list_tensors([args, kwargs])):
            self._call = None
        if self._call is None and not self._may_run:
            raise ValueError(
                "frozen_cache: the loss calls the model once more, and a part of the prefix is not kept for it."
            )
        return self.pass_over(forward, args, kwargs)

    def leave(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stand in, besides, for the last layer: let layers run that are called once more, by themselves."""
        try:
            return forward(*args, **kwargs)
        finally:
            self._call = None

    def pass_over(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stand in for a layer: return what the last one returned, or let the layer run."""
        # Copied, because what comes behind may write into it.
        return forward(*args, **kwargs) if self._call is None else _copy(self._call.returned)


@contextmanager
def _replaced_forward(layer: torch.nn.Module, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Replace what a layer computes, but not its hooks, inside the context."""
    attributes = vars(layer)
    own = attributes.get("forward")
    forward = layer.forward
    attributes["forward"] = lambda *args, **kwargs: stand_in(forward, args, kwargs)
    try:
        yield
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own


def _are_equal(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a tensor, nothing, or a tuple or list of such values."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, torch.Tensor)


def _copy(value: Any) -> Any:
    """Return a copy of a plain value, with tensors in memory of their own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value if value is None else type(value)(map(_copy, value))
