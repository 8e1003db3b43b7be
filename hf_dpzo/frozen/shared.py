"""The work of a step that all of its probe points share, micro-batch by micro-batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from hf_dpzo.data.collation import MicroBatch
from hf_dpzo.frozen.calls import SharedCalls, recording, resuming
from hf_dpzo.frozen.layers import Stretch
from hf_dpzo.frozen.prefix import Prefix, SplitInputs, compute_prefix, continuing, split_inputs
from hf_dpzo.frozen.remembered import REMEMBERED_BYTES, RepeatedStore
from hf_dpzo.frozen.rows import RowWork
from hf_dpzo.frozen.store import RowStore
from hf_dpzo.models.unwrap import Inputs, accepts_argument, unwrap_model


T = TypeVar("T")


# What is kept takes at most this share of the memory of the model, or so many bytes of a small one. More than that is
# computed again.
KEPT_SHARE = 0.05
MIN_KEPT_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class KeptWork:
    """What is kept of the evaluation of a micro-batch. SENSITIVE.

    Args:
        calls: what frozen layers returned.
        prefix: what was computed for the tokens before an invocation; `None` for rows that are evaluated as a whole.
    """

    calls: SharedCalls
    prefix: Prefix | None

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.calls.nbytes + (0 if self.prefix is None else self.prefix.nbytes)


class SharedWork:
    """Keeps what no probe point changes for each micro-batch, from the first probe point of a step to the last.

    Args:
        model: the model.
        stretches: the layers that no trained parameter comes before. See `find_stretches`.
        invocation: the tokens from which on rows are evaluated, if they have a suffix; `None` to evaluate all as a
            whole.
        fixed_shapes: whether the shapes of micro-batches are public.
        rows: computes what is kept of rows from step to step; `None` to keep nothing longer than a step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stretches: Sequence[Stretch],
        *,
        invocation: tuple[int, ...] | None = None,
        fixed_shapes: bool = False,
        rows: RowWork | None = None,
    ) -> None:
        self._stretches = tuple(stretches)
        self._invocation = invocation
        self._fixed_shapes = fixed_shapes
        self.rows = rows
        # The number of probe points that one pass evaluates fastest, if a user chooses none; `None` for one.
        self.points_per_pass: int | None = None
        # The bytes that what is kept for a step may take.
        self.room = max(MIN_KEPT_BYTES, int(KEPT_SHARE * sum(parameter.nbytes for parameter in model.parameters())))
        self._remembered: RepeatedStore | None = None
        # Hooks that belong to the model, such as that of embeddings in few bits.
        self._own_hooks = None if rows is None else _list_embedding_hooks(model)
        self._open: dict[int, Any] = {}
        # Whether the rows of the step that is open were looked up.
        self._is_read = False
        self._kept: dict[int, KeptWork] = {}
        # The micro-batches for which there was no room.
        self._too_large: set[int] = set()

    @property
    def is_split(self) -> bool:
        """Whether rows are evaluated from an invocation on."""
        return self._invocation is not None

    def read_rows_alone(self) -> None:
        """Compute what is kept of rows from step to step for each row alone, whatever the shapes."""
        if self.rows is not None:
            self.rows.read_alone()

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Remember what is computed for public rows inside the context, in which the model does not change."""
        self._remembered = RepeatedStore(RowStore(torch.empty(REMEMBERED_BYTES, dtype=torch.uint8)))
        try:
            yield
        finally:
            self._remembered = None

    @contextmanager
    def opened(self, micro_batches: Iterable[MicroBatch]) -> Iterator[None]:
        """Keep what is computed for each of `micro_batches` inside the context, as far as there is room."""
        self._open = {id(micro_batch): micro_batch for micro_batch in micro_batches}
        self._is_read = False
        try:
            yield
        finally:
            self._open, self._kept, self._too_large = {}, {}, set()

    def evaluate(
        self,
        model: torch.nn.Module,
        micro_batch: MicroBatch,
        inputs: Inputs,
        call: Callable[[torch.nn.Module, Inputs], T],
    ) -> T:
        """Return `call(model, inputs)`, from what is kept for `micro_batch`, or else keep what is computed for it.

        Rows with a suffix go through the same computation whether anything is kept or not.
        """
        kept = self._kept.get(id(micro_batch))
        split = self._split(micro_batch, inputs)
        if kept is None and self.rows is not None:
            is_open = self._is_open(micro_batch)
            rows = self.rows if is_open else self.rows.with_store(self._find_public_store(model))
            with _without_cache(model):
                if is_open and not self._is_read:
                    self._is_read = True
                    rows.read_ahead(model, self._open.values(), self._invocation, call)
                calls, prefix = rows.assemble(model, micro_batch, inputs, split, call)
            kept = self._keep(micro_batch, KeptWork(calls=calls, prefix=prefix))
        inputs = inputs if split is None else split.suffix
        if kept is None:
            prefix = None if split is None else compute_prefix(model, split.prefix)
            stretches = () if id(micro_batch) in self._too_large else self._stretches
            with _continuing(model, prefix), _without_cache(model), recording(stretches) as calls:
                result = call(model, inputs)
            self._keep(micro_batch, KeptWork(calls=calls, prefix=prefix))
            return result
        with _continuing(model, kept.prefix), _without_cache(model), resuming(kept.calls):
            return call(model, inputs)

    def _split(self, micro_batch: MicroBatch, inputs: Inputs) -> SplitInputs | None:
        """Return the inputs split at invocations; `None` for rows that are evaluated as a whole."""
        if self._invocation is None or micro_batch.suffix_length is None:
            return None
        lengths = {"suffix_length": micro_batch.suffix_length, "fixed_shapes": self._fixed_shapes}
        return split_inputs(inputs, self._invocation, **lengths)

    def _keep(self, micro_batch: MicroBatch, work: KeptWork) -> KeptWork:
        """Return `work`, and keep it if there is room and a step has begun with `micro_batch`."""
        if self._is_open(micro_batch) and id(micro_batch) not in self._too_large:
            if work.nbytes <= self.room - sum(kept.nbytes for kept in self._kept.values()):
                self._kept[id(micro_batch)] = work
            else:
                self._too_large.add(id(micro_batch))
        return work

    def _find_public_store(self, model: torch.nn.Module) -> RepeatedStore | None:
        """Return the store for public rows, unless somebody looks at or changes what the model makes of them."""
        if self._remembered is None or self._own_hooks is None:
            return None
        return self._remembered if _list_embedding_hooks(model) == self._own_hooks else None

    def _is_open(self, micro_batch: MicroBatch) -> bool:
        return self._open.get(id(micro_batch)) is micro_batch


def _list_embedding_hooks(model: torch.nn.Module) -> tuple[int, ...] | None:
    """Return the numbers of the forward hooks of the embeddings; `None` for a model without them."""
    embeddings = unwrap_model(model).get_input_embeddings()
    return None if embeddings is None else tuple(embeddings._forward_hooks)


def _continuing(model: torch.nn.Module, prefix: Prefix | None) -> AbstractContextManager[None]:
    return nullcontext() if prefix is None else continuing(model, prefix)


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
