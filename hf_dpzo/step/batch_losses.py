"""The losses of a logical batch, at the point where the parameters are. SENSITIVE."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hf_dpzo.data.collation import LogicalBatch, LogicalBatchCollator, MicroBatch
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.data.sealed import WithheldError, run_sealed, run_without_randomness
from hf_dpzo.frozen.shared import SharedWork
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.activation import hold_invocation, rows_apart
from hf_dpzo.models.state import ModelState
from hf_dpzo.models.unwrap import Inputs


@dataclass(frozen=True, kw_only=True)
class BatchLosses:
    """Evaluates a logical batch at the point where the parameters are. SENSITIVE.

    Args:
        loss: the loss of a micro-batch.
        collator: the collator that built the micro-batches, and can split one into its rows.
        prepare: a function that moves inputs to the model's device.
        device: the device of the losses.
        tail: the shape of what the loss returns for each row: `()`, or `(points,)` for several probe points at once.
        state: the state of the model, which no micro-batch may change; `None` if nobody minds.
        shared: keeps the work that all probe points of a step share; `None` if each does all of it.
        invocation: the tokens that activate the adapter; `None` for one that is always active. A row without them would
            be the base, from which nothing is learned: it has no loss, and contributes nothing.
    """

    loss: PerExampleLoss
    collator: LogicalBatchCollator
    prepare: Callable[[Any], Any]
    device: torch.device
    tail: tuple[int, ...] = ()
    state: ModelState | None = None
    shared: SharedWork | None = None
    invocation: tuple[int, ...] | None = None

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """Return one loss for each row, float32 `[rows, *tail]`; NaN for a row whose loss could not be computed."""
        waiting = deque(batch.micro_batches)
        losses = [torch.empty((0, *self.tail), device=self.device)]
        while waiting:
            losses += self._evaluate_next(model, waiting)
        return torch.cat(losses)

    @torch.no_grad()
    def of_public(self, model: torch.nn.Module, rows: Sequence[Any]) -> torch.Tensor:
        """Return the losses of public `rows`, in their order, float32 `[rows, *tail]`.

        They are computed as those of private rows are, but errors are raised.
        """
        batch = self.build_public_batch(rows)
        losses = torch.full((len(rows), *self.tail), torch.nan, device=self.device)
        for micro_batch in batch.micro_batches:
            if micro_batch.inputs is None:
                self.collator.raise_collation_error([rows[row.unit] for row in micro_batch.rows])
            units = [row.unit for row in micro_batch.rows]
            losses[units] = run_without_randomness(
                "per_example_loss", functools.partial(self._compute, model, micro_batch)
            )
        return losses

    def build_public_batch(self, rows: Sequence[Any]) -> LogicalBatch:
        """Return public `rows` as a batch, each as a unit of its own."""
        numbered = [FetchedRow(unit=unit, row=row, slot=unit) for unit, row in enumerate(rows)]
        return self.collator(numbered)["batch"]

    def _evaluate_next(self, model: torch.nn.Module, waiting: deque[MicroBatch]) -> list[torch.Tensor]:
        """Return the losses of the next micro-batch, NaN for a row that fails alone.

        If several rows fail together, return nothing, and put them back as micro-batches of one row.
        """
        micro_batch = waiting.popleft()
        try:
            return [run_sealed("per_example_loss", lambda: self._compute(model, micro_batch))]
        except WithheldError:
            if len(micro_batch.rows) == 1:
                return [torch.full((1, *self.tail), torch.nan, device=self.device)]
            waiting.extendleft(reversed(self.collator.split_into_rows(micro_batch)))
            return []

    def _compute(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """Return one loss for each drawn row of a micro-batch, in memory of its own."""
        with rows_apart(model), nullcontext() if self.state is None else self.state.guarded(model):
            # Copied, because a model or a loss may write into its inputs, which the next probe point needs too.
            inputs = self.prepare(micro_batch.copy_inputs())
            if self.shared is None:
                losses = self._call_loss(model, inputs)
            else:
                losses = self.shared.evaluate(model, micro_batch, inputs, self._call_loss)
        if not isinstance(losses, torch.Tensor) or losses.shape != (micro_batch.size, *self.tail):
            given = f"shape {list(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"per_example_loss: it returned {given}; it must return one loss for each row, shape [batch]."
            )
        # Copied, because a loss, or the graph that it is compiled to, may return the same memory each time.
        losses = losses.to(device=self.device, dtype=torch.float32, copy=True)
        if self.invocation is not None:
            held = hold_invocation(micro_batch.inputs, self.invocation, rows=micro_batch.size)
            losses[~held.to(self.device)] = torch.nan
        return losses[: len(micro_batch.rows)]

    def _call_loss(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        return self.loss(model, inputs)
