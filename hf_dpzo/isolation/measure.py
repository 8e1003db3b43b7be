"""The isolation probe as training uses it: through its own collator and loss, in each public shape."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.isolation.probe import CoupledRowsError, Isolation, probe_isolation
from hf_dpzo.isolation.synthetic_rows import PROBE_LENGTHS, generate_probe_rows
from hf_dpzo.models.fingerprints import fingerprint_frozen
from hf_dpzo.models.precision import describe_reduced_precision, refuse_changed_losses
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.batched_points import at_stacks
from hf_dpzo.zo.directions import Gaussian
from hf_dpzo.zo.walk import ProbePoint, stack


Rows = list[dict[str, Any]]


# How far public noise moves a parameter that is probed: enough to show in losses.
FILL_SCALE = 0.05


def build_probe_batches(
    dataset: Any,
    model: torch.nn.Module,
    collator: LogicalBatchCollator,
    *,
    kept_columns: Collection[str],
    public_rows: Sequence[Mapping[str, Any]] | None,
) -> list[Rows]:
    """Return the rows to probe with: `public_rows`, or made-up ones, in each shape that training will have.

    Args:
        dataset: the training rows, of which the types are read.
        model: as it is trained.
        collator: says which shapes there are.
        kept_columns: the columns that reach the collator.
        public_rows: rows that the user gave.
    """
    if public_rows is not None:
        return [[{name: row[name] for name in row if name in kept_columns} for row in public_rows]]
    lengths = _choose_lengths(collator.padded_lengths, collator.micro_batch_size)
    return [generate_probe_rows(dataset, model, kept_columns=kept_columns, lengths=one) for one in lengths]


def measure_isolation(
    model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows], *, points_per_pass: int | None = None
) -> Isolation:
    """Return how far rows move each other's losses, at most, in any of `batches`.

    Args:
        model: the model as it is trained.
        losses: evaluates a logical batch as training does.
        batches: public rows.
        points_per_pass: the number of probe points that training evaluates at once; `None` for one.

    Raises:
        CoupledRowsError: rows are not kept apart, or what is saved with the model changes.
        ValueError: the model is not float32, and a loss moved in any bit; or several points at once do not work.
    """
    one_by_one = _measure(model, losses, batches)
    if points_per_pass is None:
        return one_by_one
    return Isolation(loss_change=max(one_by_one.loss_change, _measure_stacked(model, losses, batches, points_per_pass)))


def _measure(model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows]) -> Isolation:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = fingerprint_frozen(model, trained)
    try:
        with nonzero_parameters(trained):
            found = Isolation(
                loss_change=max(
                    probe_isolation(model, partial(_losses, model, losses), rows).loss_change for rows in batches
                )
            )
    except CoupledRowsError as error:
        if describe_reduced_precision(model) is None:
            raise
        raise CoupledRowsError(f"{str(error).removesuffix('.')}, or load the base in float32.") from None
    if fingerprint_frozen(model, trained) != before:
        raise CoupledRowsError(
            "isolation: evaluating a batch changed what is saved with the model, which would carry rows into it; keep "
            "everything constant in evaluation mode."
        )
    refuse_changed_losses(model, found.loss_change)
    return found


def _measure_stacked(model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows], points: int) -> float:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    directions = Gaussian(seed=0, sizes=[parameter.numel() for parameter in trained])
    apart = [ProbePoint(direction=point, position=FILL_SCALE) for point in range(points)]
    stacks = stack(trained, directions, step=0, points=apart)
    try:
        # Of the points, the first and the last in a tensor.
        turned = [stacks, {one: values.flip(0) for one, values in stacks.items()}]
        return max(_measure(model, at_stacks(losses, model, some), batches).loss_change for some in turned)
    except Exception as error:
        raise ValueError(
            f"points_per_pass={points}: at several points at once this model or its loss fails, or joins rows "
            f"({type(error).__name__}); remove it."
        ) from error


@contextmanager
def nonzero_parameters(trained: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within, parameters that are zero hold public noise: what they multiply would show nothing of its rows.

    A new adapter adds zero to what the model makes, and no step is ever taken there.
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


def _losses(model: torch.nn.Module, losses: BatchLosses, rows: Rows) -> torch.Tensor:
    """One loss for each row: where there are several points, that of the last."""
    found = losses.of_public(model, rows)
    return found[:, -1] if losses.tail else found


def _choose_lengths(padded_lengths: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """For each shape the lengths of a few rows, and of as many as fill a micro-batch."""
    if not padded_lengths:
        return [[*PROBE_LENGTHS, *PROBE_LENGTHS[:1] * micro_batch_size]]
    several = max(5, micro_batch_size)
    return [[*[n] * several, max(1, n // 2), max(1, 3 * n // 4)] for n in padded_lengths]
