"""The work of a step that all of its probe points share, micro-batch by micro-batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from hf_dpzo.frozen.calls import SharedCalls, recording, resuming
from hf_dpzo.frozen.layers import Stretch
from hf_dpzo.models.unwrap import Inputs, accepts_argument, unwrap_model


T = TypeVar("T")


# What is kept takes at most this share of the memory of the model, or so many bytes of a small one. More than that is
# computed again.
KEPT_SHARE = 0.05
MIN_KEPT_BYTES = 1 << 24


class SharedWork:
    """Keeps what frozen layers return for each micro-batch, from the first probe point of a step to the last.

    Args:
        model: the model.
        stretches: the layers that no trained parameter comes before. See `find_stretches`.
    """

    def __init__(self, model: torch.nn.Module, stretches: Sequence[Stretch]) -> None:
        self._stretches = tuple(stretches)
        self._room = max(MIN_KEPT_BYTES, int(KEPT_SHARE * sum(parameter.nbytes for parameter in model.parameters())))
        self._open: dict[int, Any] = {}
        self._kept: dict[int, SharedCalls] = {}

    @contextmanager
    def opened(self, micro_batches: Iterable[Any]) -> Iterator[None]:
        """Keep what is computed for each of `micro_batches` inside the context, as far as there is room."""
        self._open = {id(micro_batch): micro_batch for micro_batch in micro_batches}
        try:
            yield
        finally:
            self._open, self._kept = {}, {}

    def evaluate(
        self, model: torch.nn.Module, micro_batch: Any, inputs: Inputs, call: Callable[[torch.nn.Module, Inputs], T]
    ) -> T:
        """Return `call(model, inputs)`, from what is kept for `micro_batch`, or else keep what is computed for it."""
        if self._open.get(id(micro_batch)) is not micro_batch:
            return call(model, inputs)
        kept = self._kept.get(id(micro_batch))
        with _without_cache(model), recording(self._stretches) if kept is None else resuming(kept) as recorded:
            result = call(model, inputs)
        if recorded is not None and recorded.nbytes <= self._room - sum(one.nbytes for one in self._kept.values()):
            self._kept[id(micro_batch)] = recorded
        return result


def _without_cache(model: torch.nn.Module) -> AbstractContextManager:
    """Let the model make no cache of keys and values inside the context, unless its caller asks for one.

    Nothing would read it, and layers would have to run to fill it.
    """
    base = unwrap_model(model)
    if not accepts_argument(base, "use_cache"):
        return nullcontext()

    def refuse_cache(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        own = {} if kwargs.get("past_key_values") is not None else {"use_cache": False}
        return args, {**own, **kwargs}

    return base.register_forward_pre_hook(refuse_cache, with_kwargs=True)
