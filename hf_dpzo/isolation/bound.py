"""How far rows may move each other's part in a release, in clip norms, and the limit of what is accepted."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.methods.method import Method


def describe_isolation(isolation: Isolation | None, *, fixed_shapes: bool, bound: float | None) -> dict[str, Any]:
    """Return how far the rows of a batch are kept apart, as the log and the statement say it.

    Args:
        isolation: what the probe measured; `None` if it did not run.
        fixed_shapes: whether the shapes of a row and its neighbours are public, or a row has no neighbours.
        bound: the largest move of one row's part by the other rows, in clip norms.
    """
    if isolation is None:
        return {"status": "not measured", "bound_in_clip_norms": None}
    if isolation.is_bitwise and fixed_shapes:
        return {"status": "bitwise", "bound_in_clip_norms": 0.0}
    return {"status": "bounded", "bound_in_clip_norms": float(f"{bound:.2g}")}


def worse_isolation(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weaker of two descriptions, which holds for a run that consists of both parts."""
    order = ("bitwise", "bounded", "not measured")
    return max(first, second, key=lambda part: (order.index(part["status"]), part["bound_in_clip_norms"] or 0.0))


def isolation_bound(method: Method, planned_steps: int, loss_change: float) -> float:
    """Return how far a row's coefficients move at most, in clip norms, if its loss moves by `loss_change`.

    The bound is that of the stage with the smallest smoothing.

    Args:
        method: the method of the run.
        planned_steps: the number of steps of the whole run.
        loss_change: the largest change of a row's loss that the probe measured, in units of the loss.

    >>> from hf_dpzo.methods import DPZero
    >>> method = DPZero(noise_multiplier=1.0, expected_batch_size=8, smoothing=0.5)
    >>> isolation_bound(method, planned_steps=10, loss_change=0.125)
    0.25
    """
    stages = (method.stage(step, planned_steps) for step in (0, planned_steps - 1))
    smoothing = min(stage.smoothing for stage in stages)
    estimator = replace(method.estimator, smoothing=smoothing)
    # Each of K coefficients is a difference of two losses, divided by the span and by K.
    return 2 * loss_change / estimator.span / math.sqrt(estimator.num_directions) / method.mechanism.clip_norm


# The largest bound that is accepted, in clip norms, for each row of a batch.
MAX_ISOLATION_BOUND = 0.01


def refuse_weak_isolation(bound: float) -> None:
    """Raise `ValueError` if rounding would let rows move each other's part by more than the guarantee can ignore.

    Args:
        bound: the largest move of one row's part by the other rows, in clip norms.
    """
    if bound > MAX_ISOLATION_BOUND:
        raise ValueError(
            f"isolation: rounding lets rows of a batch move each other's part by {bound:.2g} clip norms; raise "
            "smoothing or clip_norm, or set padded_lengths or per_device_train_batch_size=1."
        )
