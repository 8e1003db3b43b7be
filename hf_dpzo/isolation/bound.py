"""How far rows may move each other's part in a release, in clip norms, and the limit of what is accepted."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.methods.method import Method


def describe_isolation(isolation: Isolation | None, *, fixed_shapes: bool, bound: float | None) -> dict[str, Any]:
    """Return how far the rows of a batch are kept apart, as the log and the statement say it.

    Args:
        isolation: what the probe measured; `None` if it did not run.
        fixed_shapes: whether the shapes of a row and its neighbours are public, or a row has no neighbours.
        bound: how far one unit more or less moves the parts of all others together, in clip norms.
    """
    if isolation is None:
        return {"status": "not measured", "bound_in_clip_norms": None}
    if isolation.is_bitwise and fixed_shapes:
        return {"status": "bitwise", "bound_in_clip_norms": 0.0}
    return {"status": "bounded", "bound_in_clip_norms": float(f"{bound:.2g}")}


def worst_isolation(parts: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the weakest of some descriptions, which holds for a run that consists of all these parts."""
    order = ("bitwise", "bounded", "not measured")
    return max(parts, key=lambda part: (order.index(part["status"]), part["bound_in_clip_norms"] or 0.0))


def isolation_bound(method: Method, planned_steps: int, loss_change: float, *, reached_rows: int) -> float:
    """Return how far one unit more or less moves the parts of all others together at most, in clip norms.

    A row's loss moves by at most `loss_change` at each probe point, and its part by no more than its coefficients,
    because clipping brings parts closer to each other. Parts of rows that are not reached do not move. The bound is
    that of the stage with the smallest smoothing.

    Args:
        method: the method of the run.
        planned_steps: the number of steps of the whole run.
        loss_change: the largest change of a row's loss that the probe measured, in units of the loss.
        reached_rows: the largest number of other rows whose losses one unit can move. See `count_reached_rows`.

    >>> from hf_dpzo.methods import DPZero
    >>> method = DPZero(noise_multiplier=1.0, expected_batch_size=8, smoothing=0.5)
    >>> isolation_bound(method, planned_steps=10, loss_change=0.125, reached_rows=4)
    1.0
    """
    stages = (method.stage(step, planned_steps) for step in (0, planned_steps - 1))
    smoothing = min(stage.smoothing for stage in stages)
    estimator = replace(method.estimator, smoothing=smoothing)
    # Each of K coefficients is a difference of two losses, divided by the span and by K.
    moved = 2 * loss_change / estimator.span / math.sqrt(estimator.num_directions) / method.mechanism.clip_norm
    return moved * reached_rows


def count_reached_rows(*, micro_batch_size: int, fixed_shapes: bool, batch_capacity: int, rows_per_unit: int) -> int:
    """Return the largest number of other rows whose losses one unit more or less can move.

    A row brings at most `micro_batch_size` others into another micro-batch (see `cut_into_micro_batches`), whether it
    can be evaluated or not: one that fails takes apart the micro-batch that it is in, and no other. A unit brings up to
    `rows_per_unit` rows, so it reaches as many times more. In micro-batches of fixed shapes a loss moves, if at all,
    for another reason than their sizes, so there a whole batch counts.

    Args:
        micro_batch_size: the largest number of rows in a micro-batch.
        fixed_shapes: whether the shapes of a row and its neighbours are public, or a row has no neighbours.
        batch_capacity: the number of rows that a batch has room for.
        rows_per_unit: the largest number of rows that a unit brings to a batch.

    >>> count_reached_rows(micro_batch_size=8, fixed_shapes=False, batch_capacity=200, rows_per_unit=2)
    16
    """
    return batch_capacity if fixed_shapes else min(batch_capacity, micro_batch_size * rows_per_unit)


# The largest bound that is accepted, in clip norms, for all rows together whose parts one unit can move.
MAX_ISOLATION_BOUND = 0.01


def refuse_weak_isolation(bound: float) -> None:
    """Raise `ValueError` if rounding would let a unit move the parts of others by more than the guarantee can ignore.

    Args:
        bound: how far one unit more or less moves the parts of all others together, in clip norms.
    """
    if bound > MAX_ISOLATION_BOUND:
        raise ValueError(
            f"isolation: rounding lets rows of a batch move each other's parts by {bound:.2g} clip norms in all, and "
            f"{MAX_ISOLATION_BOUND} is the most; lower per_device_train_batch_size, raise smoothing or clip_norm, or "
            "set padded_lengths."
        )
