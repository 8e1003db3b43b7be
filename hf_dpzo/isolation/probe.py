"""The isolation probe: does one row's loss depend on its neighbours in the batch?

Clipping bounds a row's part in a release only if the row moves no loss but its own. A list of layers that couple rows
would never be complete. So the probe measures, on public rows: a row's neighbours change, and its loss must not.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel

from hf_dpzo.data.cutting import count_tokens
from hf_dpzo.data.pairs import split_pair
from hf_dpzo.data.sealed import GlobalRandomnessError
from hf_dpzo.isolation.neighbors import find_end_token, repeat_tokens
from hf_dpzo.isolation.trace import ModuleTrace, Parts, Row, extract_features, iterate_tensors, locate_row, parts_differ
from hf_dpzo.models.activation import find_invocation
from hf_dpzo.models.feature_config import find_beginning
from hf_dpzo.models.preserved import preserved
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.models.write_guard import ModelChangedError


Evaluate = Callable[[list[Row]], torch.Tensor]


# The accepted change of a loss: relative to the loss, or absolute for a loss below one. Float32 kernels that depend on
# the shape of a batch stay far below it.
COUPLING_TOLERANCE = 1e-4


REMEDY_SEPARATE = "use layers that treat each row by itself"


REMEDY_STATELESS = "keep nothing from one batch to the next"


REMEDY_PADDING = "pass position_ids and masks that leave padding out, or pad all rows to one public length"


REMEDY_OWN_TOKENS = "compute each row's loss from the outputs at that row's own tokens"


class CoupledRowsError(ValueError):
    """One row's loss depends on the other rows of its batch, or on the batches before it."""


class FailedLossError(ValueError):
    """The losses of public rows cannot be computed."""


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """The result of the probe.

    Args:
        loss_change: the largest absolute change of one row's loss when its neighbours changed, in units of the loss;
            at least what rounding may do to it where what is computed depends on the neighbours' values.

    >>> Isolation(loss_change=0.0).is_bitwise
    True
    """

    loss_change: float

    @property
    def is_bitwise(self) -> bool:
        """Whether no loss moved in any bit, and none can."""
        return self.loss_change == 0


@torch.no_grad()
def probe_isolation(model: torch.nn.Module, evaluate: Evaluate, rows: list[Row], *, followed: int = 3) -> Isolation:
    """Measure how far the loss of a row moves when the other rows of its batch change.

    The first row, the shortest and the longest if they are of other lengths, and then others if more than three are
    asked for, are followed in turn, each in at least ten calls of `evaluate`. The other rows are replaced, permuted,
    lengthened, shortened, removed, added to, made NaN, made copies of the row and repetitions of one token, and one
    batch is evaluated twice. Meanwhile the model is in evaluation mode. Afterwards its tensors, modes and
    configurations are as they were.

    Args:
        model: the model that `evaluate` calls, with or without an adapter.
        evaluate: a function from a list of rows to one loss for each, float32 `[rows]` in their order, or to its
            losses at several points, `[rows, points]`. It uses the pipeline of training: collator, padding,
            micro-batches.
        rows: public rows, two or more, which may be made up. Best are five of one length, a shorter and a longer one.
        followed: the number of rows to follow.

    Raises:
        CoupledRowsError: a loss moves by more than 1e-4 of itself (absolute for a loss below one), or a buffer changes.
            The message names the change to the batch, and the first module whose output for the row moved.
        GlobalRandomnessError: `evaluate` draws from a global generator.
        ValueError: `evaluate` fails on these rows, or one of their losses is not finite.
    """
    if len(rows) < 2:
        raise ValueError(f"probe_rows={len(rows)}: a row needs neighbours; pass two at least, better seven.")
    by_length = sorted(range(len(rows)), key=lambda index: _length(rows[index]))
    with preserved(model) as state:
        largest = 0.0
        ends = [index for index in (by_length[0], by_length[-1]) if _length(rows[index]) != _length(rows[0])]
        order = dict.fromkeys([0, *ends, *(range(len(rows)) if followed > 3 else ())])
        for index in islice(order, followed):
            others = rows[:index] + rows[index + 1 :]
            repeated = tuple(repeat_tokens(rows[index], others, kept=find_kept_tokens(model))) if index == 0 else ()
            row = _FollowedRow(model=model, evaluate=evaluate, row=rows[index], others=others, repeated=repeated)
            largest = max(largest, row.measure_change())
        refuse_written(state.find_change())
    return Isolation(loss_change=largest)


def refuse_written(name: str | None) -> None:
    """Raise `CoupledRowsError` if evaluating public rows changed what the model holds under `name`."""
    if name is not None:
        raise CoupledRowsError(
            f"isolation: evaluating a batch changed {name}, which would carry rows into later batches and into what is "
            "saved; keep it constant in evaluation mode, such as by rescale_every=0 for RWKV."
        )


@dataclass(frozen=True, kw_only=True)
class _Variation:
    """A changed batch.

    Args:
        action: the change, as the subject of a sentence.
        rows: the rows of the batch, in order.
        remedy: the advice to a user if the change moves the followed row's loss.
        own_index: the index of the followed row; `slice(None)` if all rows are it.
        poisoned: whether the embeddings of the other rows are made NaN.
    """

    action: str
    rows: list[Row]
    remedy: str
    own_index: int | slice = 0
    poisoned: bool = False


def _build_variations(row: Row, others: list[Row]) -> Iterator[_Variation]:
    """Yield the batch with which the others are compared, and then each changed batch."""
    ordered = sorted(others, key=lambda other: abs(_length(other) - _length(row)))
    near = ordered[:2]
    replaced = [*ordered[2:], row, row][: len(near)]
    lengthened = [*near[1:], max(others, key=_length)]
    shortened = [min(others, key=_length)] * len(near)
    made_nan = near if count_tokens(row) else [_replace_by_nan(other) for other in near]
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
    """Follows the loss of one row through batches with other rows."""

    model: torch.nn.Module
    evaluate: Evaluate
    row: Row
    others: list[Row]
    repeated: tuple[Row, ...]

    def measure_change(self) -> float:
        """Return the largest change of the row's loss; raise `CoupledRowsError` if it is more than rounding."""
        base, *variations = _build_variations(self.row, self.others)
        copies = len(base.rows) - 1
        variations += [
            _Variation(
                action="repeating one token in the other rows",
                rows=[self.row, *[repeated] * copies],
                remedy=REMEDY_SEPARATE,
            )
            for repeated in self.repeated
        ]
        expected = self._losses(base)
        largest = 0.0
        wrong = expected[~expected.isfinite()].tolist()
        if wrong:
            raise ValueError(f"isolation: a public row has the loss {wrong[0]}; pass probe_rows with finite losses.")
        for variation in variations:
            try:
                losses = self._losses(variation)
            except FailedLossError:
                if variation.poisoned:  # A batch that fails on NaN is taken apart, and its rows are evaluated alone.
                    continue
                raise
            changes = (losses - expected).abs()
            change = changes.max().item()
            if not (changes <= COUPLING_TOLERANCE * expected.abs().clamp(min=1)).all():
                where, remedy = self._locate_change(base, variation)
                raise CoupledRowsError(
                    f"isolation: {variation.action} moved a row's loss by {change:.2g}{where}; {remedy}."
                )
            largest = max(largest, change)
        return largest

    def _losses(self, variation: _Variation) -> torch.Tensor:
        # A collator may remove fields from the rows that it receives.
        rows = [copy.deepcopy(row) for row in variation.rows]
        try:
            with self._poison_others() if variation.poisoned else nullcontext():
                losses = self.evaluate(rows)
        except GlobalRandomnessError:
            raise
        except ModelChangedError as error:
            refuse_written(error.name)
        except Exception as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise FailedLossError(
                f"isolation: on public rows, {variation.action} raised {type(error).__name__}: {text}; correct the "
                "loss or the collator, or pass probe_rows, public rows of the data set's format."
            ) from error
        if not isinstance(losses, torch.Tensor) or losses.dim() not in (1, 2) or len(losses) != len(rows):
            raise ValueError("per_example_loss: it must return one loss for each row, shape [batch].")
        return losses[variation.own_index].double()

    def _poison_others(self) -> AbstractContextManager:
        model = unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel) or "input_ids" not in split_pair(self.row)[0]:
            return nullcontext()
        return model.get_input_embeddings().register_forward_hook(self._poison_embeddings, with_kwargs=True)

    def _poison_embeddings(
        self, module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings with NaN for the other rows, in whatever micro-batch they are. A forward hook."""
        tokens = next(iterate_tensors([args, kwargs]))
        own = [locate_row(tokens, text) for text in split_pair(self.row)]
        locations = [locate_row(tokens, text) for other in self.others for text in split_pair(other)]
        indices = {place.index for place in locations if place} - {place.index for place in own if place}
        batch = next((location.batch for location in locations if location), len(output))
        places = torch.tensor(sorted(indices), dtype=torch.long, device=output.device)
        return output.unflatten(0, (batch, -1)).index_fill(0, places, math.nan).flatten(0, 1)

    def _locate_change(self, base: _Variation, variation: _Variation) -> tuple[str, str]:
        """Return where the row's activations first differ, in words, and the advice to the user."""
        moved = None
        calls = zip(self._trace(base), self._trace(variation), strict=False)
        for (name, inputs, outputs), (new_name, new_inputs, new_outputs) in calls:
            moved = parts_differ(outputs, new_outputs) if name == new_name else None
            if moved and parts_differ(inputs, new_inputs) is False:
                return f", first in {name}", variation.remedy
        # The last module to return is the whole model.
        if moved is False:
            return ", but no module's output at its own tokens, so per_example_loss joins rows", REMEDY_OWN_TOKENS
        return "", variation.remedy

    def _trace(self, variation: _Variation) -> list[tuple[str, Parts, Parts]]:
        with ExitStack() as hooks:
            trace = ModuleTrace(self.model, self.row, hooks)
            self._losses(variation)
        return trace.calls


def find_kept_tokens(model: torch.nn.Module) -> tuple[int, ...]:
    """Return the tokens that stay in neighbours that repeat one token: ends, an invocation, and a common beginning."""
    end = find_end_token(getattr(unwrap_model(model), "config", None))
    return (*(find_invocation(model) or ()), *find_beginning(model), *(() if end is None else (end,)))


def _length(row: Row) -> int:
    return count_tokens(row)


def _replace_by_nan(row: Row) -> Row:
    nans = {name: tensor * math.nan for name, tensor in extract_features(row).items()}
    return row | {name: tensor.tolist() if isinstance(row[name], list) else tensor for name, tensor in nans.items()}
