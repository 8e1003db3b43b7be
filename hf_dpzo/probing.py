"""The isolation probe as training uses it: through its own collator and loss, in each public shape."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hf_dpzo.collation import LogicalBatchCollator
from hf_dpzo.initial import frozen_fingerprint
from hf_dpzo.isolation import CoupledRowsError, Isolation, probe
from hf_dpzo.losses import BatchLosses
from hf_dpzo.made_up import PROBE_LENGTHS, made_up_probe_rows
from hf_dpzo.precision import reduced, refuse_moved
from hf_dpzo.together import together


Rows = list[dict[str, Any]]


def batches_to_probe(
    dataset: Any,
    model: torch.nn.Module,
    collator: LogicalBatchCollator,
    *,
    kept: Collection[str],
    public: Sequence[Mapping[str, Any]] | None,
) -> list[Rows]:
    """Return the rows to probe with: the `public` ones, or made-up ones, in each shape that training will have.

    Args:
        dataset: the training rows, of which the types are read.
        model: as it is trained.
        collator: says which shapes there are.
        kept: the columns that reach the collator.
        public: rows that the user gave.
    """
    if public is not None:
        return [[{name: row[name] for name in row if name in kept} for row in public]]
    lengths = _lengths(collator.padded_lengths, collator.micro_batch_size)
    return [made_up_probe_rows(dataset, model, kept=kept, lengths=one) for one in lengths]


def measured(model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows]) -> Isolation:
    """Return what the probe measures, at most, with any of `batches`.

    Raises:
        CoupledRowsError: rows are not kept apart, or what is saved with the model changes.
        ValueError: the model is not float32, and a loss moved in any bit.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = frozen_fingerprint(model, trained)
    try:
        found = Isolation(moved=max(probe(model, partial(_losses, model, losses), rows).moved for rows in batches))
    except CoupledRowsError as error:
        if reduced(model) is None:
            raise
        raise CoupledRowsError(f"{str(error).removesuffix('.')}, or load the base in float32.") from None
    if frozen_fingerprint(model, trained) != before:
        raise CoupledRowsError(
            "isolation: evaluating a batch changed what is saved with the model, which would carry rows into it; keep "
            "everything constant in evaluation mode."
        )
    refuse_moved(model, found.moved)
    return found


def moved_together(model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Rows], points: int) -> float:
    """As far as rows move each other's losses where so many points are evaluated at once, here all the same.

    Raises:
        ValueError: that does not work, with this model and its loss.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stacks = [parameter.detach().expand(points, *parameter.shape).clone() for parameter in trained]
    try:
        return measured(model, together(losses, model, trained, stacks), batches).moved
    except Exception as error:
        raise ValueError(
            f"points_per_pass={points}: at several points at once this model or its loss fails, or joins rows "
            f"({type(error).__name__}); remove it."
        ) from error


def _losses(model: torch.nn.Module, losses: BatchLosses, rows: Rows) -> torch.Tensor:
    """One loss for each row: where there are several points, that of the last, which lies farthest in a tensor."""
    found = losses.of_public(model, rows)
    return found[:, -1] if losses.tail else found


def _lengths(padded_lengths: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """For each shape the lengths of a few rows, and of as many as fill a micro-batch."""
    if not padded_lengths:
        return [[*PROBE_LENGTHS, *PROBE_LENGTHS[:1] * micro_batch_size]]
    several = max(5, micro_batch_size)
    return [[*[n] * several, max(1, n // 2), max(1, 3 * n // 4)] for n in padded_lengths]
