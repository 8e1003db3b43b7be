"""Runs the isolation probe as training would run: with its collator and loss, in each public shape."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._dynamo import OptimizedModule

from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.cutting import count_tokens
from hf_dpzo.isolation.neighbors import repeat_tokens
from hf_dpzo.isolation.operations import OperationTrace
from hf_dpzo.isolation.probe import (
    COUPLING_TOLERANCE,
    REMEDY_PADDING,
    CoupledRowsError,
    Isolation,
    find_kept_tokens,
    probe_isolation,
    refuse_written,
)
from hf_dpzo.isolation.synthetic_rows import PROBE_LENGTHS, SeveralTypesError, generate_probe_rows, infer_columns
from hf_dpzo.isolation.watched import WatchedLoss
from hf_dpzo.models.activation import find_invocation
from hf_dpzo.models.feature_config import find_beginning
from hf_dpzo.models.precision import describe_reduced_precision, refuse_changed_losses
from hf_dpzo.models.set_aside import find_set_aside
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.batched_points import at_stacks
from hf_dpzo.zo.directions import Gaussian
from hf_dpzo.zo.walk import ProbePoint, stack


Rows = list[dict[str, Any]]
Tick = Callable[[], object]


# How far rounding may move a loss where what is computed depends on values: absolute, or relative to a loss above one.
ROUNDING_BY_VALUE = 1e-6


# How far padding may move the loss of a model that is not float32, in the same terms.
REDUCED_TOLERANCE = 0.05


# The number of rows that are followed through batches of a shape, and the number where a loss changes in jumps.
FEW_ROWS, MANY_ROWS = 3, 5


# The standard deviation of the public noise in a parameter while it is probed: enough to show in losses.
FILL_SCALE = 0.05


def build_probe_batches(
    dataset: Any,
    model: torch.nn.Module,
    collator: LogicalBatchCollator,
    *,
    kept_columns: Collection[str],
    public_rows: Sequence[Mapping[str, Any]] | None,
    ending: Sequence[int] = (),
) -> list[Rows]:
    """Return batches of rows to probe with: `public_rows`, or made-up rows in each shape that training will have.

    Args:
        dataset: the training rows, of which only the types are read.
        model: the model as it is trained.
        collator: the collator of training, which knows the shapes.
        kept_columns: the columns that reach the collator.
        public_rows: the user's public rows; `None` for made-up ones.
        ending: the tokens that each row ends with, if that is public.
    """
    if public_rows is not None:
        return [[{name: row[name] for name in row if name in kept_columns} for row in public_rows]]
    shapes = _choose_lengths(collator, ending or find_invocation(model) or (), find_beginning(model))
    kept = {"kept_columns": kept_columns, "ending": ending}
    return [generate_probe_rows(dataset, model, lengths=lengths, **kept) for lengths in shapes]


def list_columns(dataset: Any, public_rows: Sequence[Mapping[str, Any]] | None) -> set[str]:
    """Return the names of the columns: by `dataset`, or by `public_rows` where its first rows have several types."""
    try:
        return {column.name for column in infer_columns(dataset)}
    except SeveralTypesError:
        if public_rows is None:
            raise
        return {name for row in public_rows for name in row}


def measure_isolation(
    model: torch.nn.Module,
    losses: BatchLosses,
    batches: Sequence[Rows],
    *,
    points_per_pass: int | None = None,
    tick: Tick = lambda: None,
) -> Isolation:
    """Measure how far rows move each other's losses at most, in any of `batches`.

    Args:
        model: the model as it is trained: prepared, and perhaps compiled. What is compiled is also measured as it was
            before, since hooks that look inside have no effect on it.
        losses: the losses of a logical batch, as in training.
        batches: batches of public rows.
        points_per_pass: the number of probe points that training evaluates at once; `None` for one.
        tick: a function that is called after each batch that was evaluated.

    Raises:
        CoupledRowsError: rows are not kept apart, or evaluating them changes what is saved with the model.
        ValueError: the model is not float32 and a loss moved in any bit, or evaluating several points at once fails.
    """
    eager = model._orig_mod if isinstance(model, OptimizedModule) else model
    with nullcontext() if losses.shared is None else losses.shared.remembering():
        changes = []
        if points_per_pass is not None:
            changes.append(_measure_stacked(model, losses, batches, points_per_pass, tick))
        if points_per_pass is None or eager is not model:  # Otherwise no step evaluates a single point.
            changes += [_measure(form, losses, batches, tick) for form in dict.fromkeys([eager, model])]
        refuse_padding(eager, losses, batches, tick)
    # Shapes between the first and the last differ in nothing but their length.
    ends = [*batches[:1], *batches[1:][-1:]]
    if losses.collator.micro_batch_size > 1 and any(computes_by_value(eager, losses, rows, tick) for rows in ends):
        changes.append(ROUNDING_BY_VALUE * max(1.0, *(losses.of_public(eager, rows).abs().max() for rows in batches)))
    refuse_changed_losses(model, max(changes))
    return Isolation(loss_change=float(max(changes)))


def refuse_padding(
    model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows], tick: Tick = lambda: None
) -> None:
    """Raise `CoupledRowsError` if padding to a public length moves the loss of a row from what it is without padding.

    Without public lengths, its neighbours would decide how far it is padded, and the probe would find this.
    """
    if not losses.collator.padded_lengths:
        return
    alone = replace(losses, collator=replace(losses.collator, padded_lengths=(), micro_batch_size=1))
    reduced = describe_reduced_precision(model) or describe_reduced_precision(find_set_aside(model) or model)
    tolerance = COUPLING_TOLERANCE if reduced is None else REDUCED_TOLERANCE
    with nonzero_parameters([parameter for parameter in model.parameters() if parameter.requires_grad]):
        for rows in batches:
            padded, unpadded = losses.of_public(model, rows), alone.of_public(model, rows)
            tick()
            change = ((padded - unpadded).abs() / unpadded.abs().clamp(min=1)).max().item()
            if not change <= tolerance:
                raise CoupledRowsError(
                    f"padded_lengths={list(losses.collator.padded_lengths)}: padding moved a row's loss by "
                    f"{change:.2g}, so that what is trained is not the row without it; {REMEDY_PADDING}, or leave "
                    "padded_lengths out and set per_device_train_batch_size=1."
                )


def computes_by_value(model: torch.nn.Module, losses: BatchLosses, rows: Rows, tick: Tick = lambda: None) -> bool:
    """Return whether what is computed for a row depends on the tokens of its neighbours, and not only on shapes."""
    row, *others = rows
    count = min(len(others), losses.collator.micro_batch_size - 1)
    traces = []
    for neighbor in [row, *repeat_tokens(row, others, kept=find_kept_tokens(model))]:
        with OperationTrace() as trace:
            losses.of_public(model, [row, *[neighbor] * count])
        tick()
        traces.append(trace)
    return any(trace.depends_on_values or trace.operations != traces[0].operations for trace in traces)


def _measure(model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows], tick: Tick) -> float:
    """Return the largest change of a row's loss, in units of the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses.state.restored = None
    try:
        with nonzero_parameters(trained):
            evaluate = partial(_evaluate, model, losses, tick)
            # Of a loss that changes in jumps, more rows are followed: few of them may be near a tie.
            micro_batch_size = losses.collator.micro_batch_size
            in_jumps = isinstance(losses.loss, WatchedLoss) and micro_batch_size > 1
            counts = [MANY_ROWS if in_jumps else FEW_ROWS] * len(batches)
            if not in_jumps:  # Shapes between the first and the last differ from these in nothing but their length.
                counts[1:-1] = [1] * len(counts[1:-1])
            loss_change = max(
                probe_isolation(model, evaluate, choose_rows(rows, micro_batch_size), followed=count).loss_change
                for rows, count in zip(batches, counts, strict=True)
            )
    except CoupledRowsError as error:
        if describe_reduced_precision(model) is None:
            raise
        raise CoupledRowsError(f"{str(error).removesuffix('.')}, or load the base in float32.") from None
    refuse_written(losses.state.restored)
    return loss_change


def choose_rows(rows: Rows, micro_batch_size: int) -> Rows:
    """Return as many of `rows` as the probe would make up: more than fill a micro-batch, of the most and fewest tokens.

    Users pass hundreds of public rows, and each of some dozens of batches would hold them all.

    >>> rows = [{"input_ids": [5] * (3 + number % 20)} for number in range(40)]
    >>> [len(row["input_ids"]) for row in choose_rows(rows, 1)]
    [3, 4, 5, 6, 7, 8, 9, 22]
    """
    most = (
        len(PROBE_LENGTHS) + micro_batch_size + 1
    )  # As `_choose_lengths` has at most, so that none of these is left out.
    if len(rows) <= most:
        return rows
    shortest, *_, longest = sorted(range(len(rows)), key=lambda number: count_tokens(rows[number]))
    return [rows[number] for number in sorted({*range(most - 2), shortest, longest})]


def _measure_stacked(
    model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows], points: int, tick: Callable[[], object]
) -> float:
    """Return the largest change of a row's loss at any of several points that are evaluated at once.

    What fails there is tried at a single point, because an error of it says more: where rows are joined, for one.
    """
    try:
        return _measure(model, at_stacks(losses, model, _build_stacks(model, points)), batches, tick)
    except Exception as error:
        _measure(model, losses, batches, tick)
        raise _refuse_points(points, error) from error


def try_stacked(model: torch.nn.Module, losses: BatchLosses, rows: Rows, points: int) -> None:
    """Raise `ValueError` if evaluating several probe points at once fails on public `rows`."""
    try:
        at_stacks(losses, model, _build_stacks(model, points)).of_public(model, rows)
    except Exception as error:
        raise _refuse_points(points, error) from error


def _build_stacks(model: torch.nn.Module, points: int) -> dict[torch.Tensor, torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    directions = Gaussian(seed=0, sizes=[parameter.numel() for parameter in trained])
    # In pairs around where the parameters are, as those of central differences, which a loss may evaluate as such.
    sides = (FILL_SCALE, -FILL_SCALE)
    probe_points = [ProbePoint(direction=point // 2, position=sides[point % 2]) for point in range(points)]
    return stack(trained, directions, step=0, points=probe_points)


def _refuse_points(points: int, error: Exception) -> ValueError:
    """Return what to say of an error that comes of several points at once."""
    return ValueError(
        f"points_per_pass={points}: at several points at once this model or its loss fails, or joins rows "
        f"({type(error).__name__}); remove it."
    )


@contextmanager
def nonzero_parameters(trained: Sequence[torch.Tensor]) -> Iterator[None]:
    """Fill parameters that are zero with public noise inside the context, and set them to zero afterwards.

    A new adapter adds zero to the model's activations, so the probe would not see what it does to rows. After the first
    step it is no longer zero.
    """
    directions = Gaussian(seed=0, sizes=[parameter.numel() for parameter in trained])
    zeros = {index: parameter for index, parameter in enumerate(trained) if not parameter.any()}
    for index, parameter in zeros.items():
        directions.add_(parameter, index=index, step=0, weights={0: FILL_SCALE})
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros.values():
                parameter.zero_()


def _evaluate(model: torch.nn.Module, losses: BatchLosses, tick: Tick, rows: Rows) -> torch.Tensor:
    """Return one loss for each row, or one at each of several points."""
    evaluated = losses.of_public(model, rows)
    tick()
    if isinstance(losses.loss, WatchedLoss):
        return evaluated.double().sum(dim=1)  # In float32 a digest would be lost beside a large loss.
    return evaluated


def _choose_lengths(
    collator: LogicalBatchCollator, invocation: Sequence[int], beginning: Sequence[int]
) -> list[list[int]]:
    """Return for each shape the lengths of a batch's rows, which are more than fill a micro-batch.

    Of public lengths, those that have no room for an invocation are left out: rows of them contribute nothing. Where
    rows have a common beginning, most of these do too, and one has no room for it and a token after it.
    """
    padded_lengths, micro_batch_size = collator.padded_lengths, collator.micro_batch_size
    if not padded_lengths:
        missing = max(0, len(invocation) + 2 - min(PROBE_LENGTHS), len(beginning) + 1 - PROBE_LENGTHS[0])
        lengths = [length + missing + missing % 2 for length in PROBE_LENGTHS]  # Odd lengths stay odd.
        return [[*lengths, *lengths[:1] * micro_batch_size, *([len(beginning)] if beginning else [])]]
    several = max(5, micro_batch_size)
    fitting = [length for length in padded_lengths if length >= len(invocation)]
    if not fitting:
        raise ValueError(
            f"padded_lengths={list(padded_lengths)}: none has room for the {len(invocation)} tokens that activate the "
            "adapter; add a longer one."
        )
    shortest = len(beginning) or max(fitting)
    return [[*[n] * several, max(1, min(n // 2, shortest)), max(1, 3 * n // 4)] for n in fitting]
