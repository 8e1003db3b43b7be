"""How far rows may move each other's part in a release: in clip norms, and how far at most."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.methods.method import Method


def describe_isolation(isolation: Isolation | None, *, fixed_shapes: bool, bound: float | None) -> dict[str, Any]:
    """How far the rows of a batch are kept apart.

    Args:
        isolation: what the probe measured; `None` where nothing was.
        fixed_shapes: whether a row's shape and its neighbours' are public, or it has no neighbours.
        bound: how far rows may move each other's part, in clip norms.
    """
    if isolation is None:
        return {"status": "not measured", "bound_in_clip_norms": None}
    if isolation.is_bitwise and fixed_shapes:
        return {"status": "bitwise", "bound_in_clip_norms": 0.0}
    return {"status": "bounded", "bound_in_clip_norms": float(f"{bound:.2g}")}


def worse_isolation(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """What holds of a run of which one part was isolated as `first`, and the other as `second`."""
    order = ("bitwise", "bounded", "not measured")
    return max(first, second, key=lambda one: (order.index(one["status"]), one["bound_in_clip_norms"] or 0.0))


def isolation_bound(method: Method, planned_steps: int, loss_change: float) -> float:
    """How far a row's coefficients move, in clip norms, where its loss may move by `loss_change`; in the worst stage.

    >>> from hf_dpzo.methods import DPZero
    >>> method = DPZero(noise_multiplier=1.0, expected_batch_size=8, smoothing=0.5)
    >>> isolation_bound(method, planned_steps=10, loss_change=0.125)
    0.25
    """
    stages = (method.stage(step, planned_steps) for step in (0, planned_steps - 1))
    smoothing = min(stage.smoothing for stage in stages)
    estimator = replace(method.estimator, smoothing=smoothing)
    # A coefficient is a difference over the span and over K; K of them make a vector.
    return 2 * loss_change / estimator.span / math.sqrt(estimator.num_directions) / method.mechanism.clip_norm


# In clip norms, for each row of a batch.
MAX_ISOLATION_BOUND = 0.01


def refuse_weak_isolation(bound: float) -> None:
    """Raise `ValueError` where rounding would let rows move each other's part by more than the guarantee can ignore."""
    if bound > MAX_ISOLATION_BOUND:
        raise ValueError(
            f"isolation: rounding lets rows of a batch move each other's part by {bound:.2g} clip norms; raise "
            "smoothing or clip_norm, or set padded_lengths or per_device_train_batch_size=1."
        )
