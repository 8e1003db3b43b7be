"""The isolation probe: does one row's loss depend on its neighbours in the batch?

Clipping bounds a row's part in a release only if the row moves no loss but its own. Lists of layers that join rows are
never complete. So it is measured, on public rows: a row's neighbours are exchanged, and its loss must stay.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_dpzo.data.sealed import GlobalRandomnessError
from hf_dpzo.isolation.trace import ModuleTrace, Parts, Row, extract_features, iterate_tensors, locate_row, parts_differ
from hf_dpzo.models.unwrap import unwrap_model


Evaluate = Callable[[list[Row]], torch.Tensor]


# Relative to the loss, or absolute below one. Float32 kernels that differ by the shape of a batch stay far below it.
COUPLING_TOLERANCE = 1e-4


REMEDY_SEPARATE = "use layers that treat each row by itself"


REMEDY_STATELESS = "keep nothing from one batch to the next"


REMEDY_PADDING = "pass position_ids and masks that leave padding out, or pad all rows to one public length"


REMEDY_OWN_TOKENS = "compute each row's loss from the outputs at that row's own tokens"


class CoupledRowsError(ValueError):
    """One row's loss depends on the other rows of its batch, or on the batches before it."""


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What the probe measured.

    Args:
        loss_change: the largest absolute change of one row's loss when its neighbours changed, in units of the loss.

    >>> Isolation(loss_change=0.0).is_bitwise
    True
    """

    loss_change: float

    @property
    def is_bitwise(self) -> bool:
        """Whether each loss was equal to the last bit."""
        return self.loss_change == 0


@torch.no_grad()
def probe_isolation(model: torch.nn.Module, evaluate: Evaluate, rows: list[Row]) -> Isolation:
    """Measure how far the loss of a row moves when the other rows of its batch change.

    The first row, the shortest and the longest are followed in turn. In ten calls of `evaluate` for each, others are
    replaced, permuted, lengthened, shortened, removed, added to, made NaN and made copies of the row, and one batch is
    evaluated twice. The model is in evaluation mode meanwhile; its modes and buffers are afterwards as they were.

    Args:
        model: the one that `evaluate` calls, with or without an adapter.
        evaluate: from a list of rows to one loss for each, float32 `[rows]` in the order of the rows, by whatever
            pipeline training uses: collator, padding, micro-batches.
        rows: made up, or other public ones; two at least. Best are five of one length, a shorter and a longer one.

    Raises:
        CoupledRowsError: when a loss moves by more than 1e-4 of itself (absolute where it is below one), or a buffer
            changes. It names what was done, and the first module whose output for the row moved.
        GlobalRandomnessError: `evaluate` draws from a global generator.
        ValueError: when `evaluate` fails on these rows, or gives one of them a loss that is not finite.
    """
    if len(rows) < 2:
        raise ValueError(f"probe_rows={len(rows)}: a row needs neighbours; pass two at least, better seven.")
    by_length = sorted(range(len(rows)), key=lambda index: _length(rows[index]))
    with _preserved_state(model) as buffers:
        moved = 0.0
        for index in dict.fromkeys([0, by_length[0], by_length[-1]]):
            others = rows[:index] + rows[index + 1 :]
            moved = max(
                moved, _FollowedRow(model=model, evaluate=evaluate, row=rows[index], others=others).measure_change()
            )
        changed = [name for name, (_, copied) in buffers.items() if not torch.equal(model.get_buffer(name), copied)]
    if changed:
        raise CoupledRowsError(
            f"isolation: evaluating a batch changed the buffer {changed[0]}, which would carry rows into later batches "
            "and into the saved weights; keep it constant in evaluation mode."
        )
    return Isolation(loss_change=moved)


@contextmanager
def _preserved_state(model: torch.nn.Module) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """In evaluation mode, with its buffers beside copies of them; afterwards all is put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    model.eval()
    try:
        yield buffers
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, (buffer, copied) in buffers.items():
            if not torch.equal(buffer, copied):
                buffer.copy_(copied)
            owner, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(owner), own_name, buffer)  # Where forward has put another in its place.


@dataclass(frozen=True, kw_only=True)
class _Variation:
    """A batch with the row that is followed at `own_index`, or in each place. `action` is the subject of a sentence."""

    action: str
    rows: list[Row]
    remedy: str
    own_index: int | slice = 0
    poisoned: bool = False


def _build_variations(row: Row, others: list[Row]) -> Iterator[_Variation]:
    """First the batch that all the others are compared with."""
    ordered = sorted(others, key=lambda other: abs(_length(other) - _length(row)))
    near, replaced = ordered[:2], [*ordered[2:], row, row][: len(ordered[:2])]
    lengthened, shortened = [*near[1:], max(others, key=_length)], [min(others, key=_length)] * len(near)
    made_nan = near if "input_ids" in row else [_replace_by_nan(other) for other in near]
    yield _Variation(action="evaluating a batch", rows=[row, *near], remedy=REMEDY_STATELESS)
    yield _Variation(action="evaluating the same batch again", rows=[row, *near], remedy=REMEDY_STATELESS)
    yield _Variation(action="replacing the other rows of a batch", rows=[row, *replaced], remedy=REMEDY_SEPARATE)
    yield _Variation(action="permuting a batch", rows=[*near[::-1], row], own_index=len(near), remedy=REMEDY_SEPARATE)
    yield _Variation(
        action="filling a batch with one row",
        rows=[row] * (1 + len(others)),
        own_index=slice(None),
        remedy=REMEDY_SEPARATE,
    )
    yield _Variation(action="lengthening another row of a batch", rows=[row, *lengthened], remedy=REMEDY_PADDING)
    yield _Variation(action="shortening the other rows of a batch", rows=[row, *shortened], remedy=REMEDY_PADDING)
    yield _Variation(action="removing the other rows of a batch", rows=[row], remedy=REMEDY_SEPARATE)
    yield _Variation(action="adding rows to a batch", rows=[row, *ordered], remedy=REMEDY_SEPARATE)
    yield _Variation(
        action="making the other rows of a batch NaN", rows=[row, *made_nan], remedy=REMEDY_SEPARATE, poisoned=True
    )


@dataclass(frozen=True, kw_only=True)
class _FollowedRow:
    """One row, whose loss is followed through batches with others."""

    model: torch.nn.Module
    evaluate: Evaluate
    row: Row
    others: list[Row]

    def measure_change(self) -> float:
        """The largest change of the row's loss. Raises where it is more than rounding."""
        base, *variations = _build_variations(self.row, self.others)
        expected, largest = self._losses(base).item(), 0.0
        if not math.isfinite(expected):
            raise ValueError(f"isolation: a public row has the loss {expected}; pass probe_rows with finite losses.")
        for batch in variations:
            moved = (self._losses(batch) - expected).abs().max().item()
            if not moved <= COUPLING_TOLERANCE * max(1.0, abs(expected)):
                where, remedy = self._where(base, batch)
                raise CoupledRowsError(f"isolation: {batch.action} moved a row's loss by {moved:.2g}{where}; {remedy}.")
            largest = max(largest, moved)
        return largest

    def _losses(self, variation: _Variation) -> torch.Tensor:
        rows = [copy.deepcopy(row) for row in variation.rows]  # Collators may take fields out of what they are given.
        try:
            with self._poison_others() if variation.poisoned else nullcontext():
                losses = self.evaluate(rows)
        except GlobalRandomnessError:
            raise
        except Exception as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"isolation: on public rows, {variation.action} raised {type(error).__name__}: {text}; correct the "
                "loss or the collator, or pass probe_rows, public rows of the data set's format."
            ) from error
        if not isinstance(losses, torch.Tensor) or losses.shape != (len(rows),):
            raise ValueError("per_example_loss: it must return one loss for each row, shape [batch].")
        return losses[variation.own_index].double()

    def _poison_others(self) -> AbstractContextManager:
        model = unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel) or "input_ids" not in self.row:
            return nullcontext()
        return model.get_input_embeddings().register_forward_hook(self._poison_embeddings, with_kwargs=True)

    def _poison_embeddings(
        self, module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor
    ) -> torch.Tensor:
        """A hook: the embeddings of the other rows become NaN, in whatever batches they are."""
        tokens = next(iterate_tensors([args, kwargs]))
        own, places = locate_row(tokens, self.row), [locate_row(tokens, other) for other in self.others]
        indices = {place.index for place in places if place} - {own.index if own else None}
        return output.index_fill(0, torch.tensor(sorted(indices), dtype=torch.long, device=output.device), math.nan)

    def _where(self, base: _Variation, variation: _Variation) -> tuple[str, str]:
        """Where the row's ways part, in words, and what to do about it."""
        moved, before, after = None, self._trace(base), self._trace(variation)
        for (name, given, made), (other_name, given_now, made_now) in zip(before, after, strict=False):
            moved = parts_differ(made, made_now) if name == other_name else None
            if moved and parts_differ(given, given_now) is False:
                return f", first in {name}", variation.remedy
        if moved is False:  # The last one to return is the model.
            return ", but no module's output at its own tokens, so per_example_loss joins rows", REMEDY_OWN_TOKENS
        return "", variation.remedy

    def _trace(self, variation: _Variation) -> list[tuple[str, Parts, Parts]]:
        with ExitStack() as hooks:
            trace = ModuleTrace(self.model, self.row, hooks)
            self._losses(variation)
        return trace.calls


def _length(row: Row) -> int:
    return len(row["input_ids"]) if "input_ids" in row else 0


def _replace_by_nan(row: Row) -> Row:
    made = {name: tensor * math.nan for name, tensor in extract_features(row).items()}
    return row | {name: tensor.tolist() if isinstance(row[name], list) else tensor for name, tensor in made.items()}
