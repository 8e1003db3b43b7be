"""The privacy cost of a plan, and how it changes with the plan's steps, batch size, noise or target.

This is pure accounting, without data or a model. Each point of a curve is computed as a single plan would be.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np

from hf_dpzo.privacy.accounting import (
    MAX_GROUP_SIZE,
    Guarantee,
    account,
    account_for_group,
    check_delta,
    check_epsilon,
)
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.interpretation import membership_accuracy
from hf_dpzo.privacy.queries import MAX_NOISE_MULTIPLIER, QUERIES, GaussianQuery, LaplaceQuery, Releases
from hf_dpzo.privacy.rounding import round_up


# The fields of a curve that take whole numbers only.
WHOLE = ("max_steps", "expected_batch_size")


# The factor by which a curve reaches, by default, to both sides of the plan's own value.
DEFAULT_REACH = {"max_steps": 10.0, "expected_batch_size": 10.0, "noise_multiplier": 4.0, "target_epsilon": 4.0}


# Curves of calibrated noise have fewer points, because calibration takes seconds for each.
DEFAULT_POINTS, DEFAULT_CALIBRATED_POINTS = 13, 7


MAX_POINTS = 200


# More steps than any run takes.
_MAX_STEPS = 10**9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run: what each step releases, how often, and from how many rows.

    Args:
        noise: `gaussian` or `laplace`.
        noise_multiplier: the noise's scale over the sensitivity; `None` for the least that meets `target_epsilon`.
        target_epsilon: the largest epsilon allowed, at `target_delta`, or for Laplace noise at delta 0; `None` where
            `noise_multiplier` is given.
        target_delta: the delta at which epsilon is stated.
        num_rows: the number of rows of training data.
        expected_batch_size: the mean number of rows in a batch.
        max_steps: the number of steps of the whole run.

    Raises:
        ValueError: no run could have this plan.

    >>> plan = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000)
    >>> plan.query
    GaussianQuery(noise_multiplier=1.2, sampling_rate=0.0128)
    """

    noise: str = "gaussian"
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    target_delta: float
    num_rows: int
    expected_batch_size: int
    max_steps: int

    def __post_init__(self) -> None:
        if self.noise not in QUERIES:
            raise ValueError(f"noise={self.noise}: it is none of {' and '.join(QUERIES)}; choose one of them.")
        if not 0 < self.expected_batch_size <= self.num_rows:
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size}: with {self.num_rows} rows "
                "it must lie between 1 and that."
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: there must be at least one step.")
        if not isinstance(self.max_steps, Integral):
            raise ValueError(f"max_steps={self.max_steps}: there is no part of a step; choose a whole number.")
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier}, target_epsilon={self.target_epsilon}: give one of the two."
            )
        check_delta(self.target_delta, num_rows=self.num_rows)

    @property
    def query(self) -> GaussianQuery | LaplaceQuery:
        """The release of one step. Raises `ValueError` where no noise meets the target."""
        noise_multiplier = 1.0 if self.noise_multiplier is None else self.noise_multiplier
        sampling_rate = self.expected_batch_size / self.num_rows
        query = QUERIES[self.noise](noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)
        if self.target_epsilon is None:
            return query
        return calibrate_query(
            query, steps=self.max_steps, target_epsilon=self.target_epsilon, target_delta=self.target_delta
        )


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A plan, the release of each of its steps, and the guarantee for all of them.

    Args:
        plan: the plan, with its noise or its target.
        query: the release of one step, with the noise that the plan gives or that meets its target.
        guarantee: the upper bounds on the epsilon of all steps.

    >>> plan = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000)
    >>> compute_curve(plan, "max_steps", [500]).plan_point.as_row()["noise_multiplier"]
    1.2
    """

    plan: Plan
    query: GaussianQuery | LaplaceQuery
    guarantee: Guarantee

    @property
    def releases(self) -> Releases:
        """The releases of all steps."""
        return ((self.query, self.plan.max_steps),)

    def group_epsilon(self, rows_per_person: int) -> float:
        """Return an upper bound on epsilon for a person with several rows, at the plan's delta.

        For Laplace noise it holds at delta 0. It is infinite where no bound is known.

        Args:
            rows_per_person: the largest number of rows that one person has.

        Raises:
            ValueError: `rows_per_person` is not a whole number from 1 to 64.
        """
        check_group(rows_per_person)
        return account_for_group(self.releases, size=rows_per_person, delta=self.guarantee.delta)

    def as_row(self) -> dict[str, str | float | None]:
        """Return the point as a row of a table. Bounds are rounded up; `None` where an accountant does not apply."""
        bounds = {
            "epsilon": self.guarantee.epsilon,
            "epsilon_pld": self.guarantee.pld,
            "epsilon_rdp": self.guarantee.rdp,
            "epsilon_pure": self.guarantee.pure,
            "best_membership_accuracy": membership_accuracy(self.releases, delta=self.guarantee.delta),
        }
        return {
            "noise": self.plan.noise,
            "noise_multiplier": self.query.noise_multiplier,
            "sampling_rate": self.query.sampling_rate,
            "expected_batch_size": self.plan.expected_batch_size,
            "max_steps": self.plan.max_steps,
            "num_rows": self.plan.num_rows,
            "target_delta": self.plan.target_delta,
            "target_epsilon": self.plan.target_epsilon,
            **{name: None if bound is None else round_up(bound) for name, bound in bounds.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The trade-off of a plan: how its noise or its guarantee changes with one field.

    Args:
        against: the name of the field that changes.
        plan_point: the plan's own point.
        points: the points in increasing order of the field, `plan_point` among them.
        num_left_out: the number of values of the field for which no epsilon can be stated.

    >>> plan = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000)
    >>> curve = compute_curve(plan, "max_steps", [500])
    >>> [curve.value_at(point) for point in curve.points]
    [500, 1000]
    """

    against: str
    plan_point: CurvePoint
    points: tuple[CurvePoint, ...]
    num_left_out: int

    def value_at(self, point: CurvePoint) -> float:
        """Return the value of the field at `point`."""
        return getattr(point.plan, self.against)


def check_group(rows_per_person: int) -> None:
    """Raise `ValueError` unless `rows_per_person` is a whole number from 1 to `MAX_GROUP_SIZE`."""
    if not (isinstance(rows_per_person, Integral) and 1 <= rows_per_person <= MAX_GROUP_SIZE):
        raise ValueError(f"rows_per_person={rows_per_person}: it must lie between 1 and {MAX_GROUP_SIZE}.")


def account_for_plan(plan: Plan) -> CurvePoint:
    """Return `plan` with its query and its guarantee, or raise `ValueError` where no epsilon can be stated for it.

    >>> plan = Plan(noise_multiplier=1.0, target_delta=1e-5, num_rows=5000, expected_batch_size=50, max_steps=1000)
    >>> round(account_for_plan(plan).guarantee.epsilon, 3)
    1.828
    """
    query = plan.query
    spent = account(((query, plan.max_steps),), delta=plan.target_delta)
    check_epsilon(spent)
    return CurvePoint(plan=plan, query=query, guarantee=spent)


def choose_values(
    plan: Plan, against: str, *, low: float | None = None, high: float | None = None, points: int | None = None
) -> tuple[float, ...]:
    """Return values of the field `against` in equal ratios from `low` to `high`, with the plan's own among them.

    By default, they reach to both sides of the plan's own value by the factor in `DEFAULT_REACH`. They are rounded to
    six digits, and steps and rows to whole numbers, so there may be fewer than `points`.

    >>> plan = Plan(noise_multiplier=1.0, target_delta=1e-5, num_rows=5000, expected_batch_size=50, max_steps=1000)
    >>> choose_values(plan, "max_steps", low=10, points=4)
    (10, 100, 1000, 10000)
    """
    own_value = getattr(plan, against)
    limits = {"max_steps": _MAX_STEPS, "expected_batch_size": plan.num_rows, "noise_multiplier": MAX_NOISE_MULTIPLIER}
    smallest = 1 if against in WHOLE else 0
    largest = limits.get(against, math.inf)
    low = max(smallest, own_value / DEFAULT_REACH[against]) if low is None else low
    high = min(largest, own_value * DEFAULT_REACH[against]) if high is None else high
    if not (0 < low < high < math.inf and smallest <= low <= own_value <= high <= largest):
        raise ValueError(
            f"from={low:g}, to={high:g}: {against} lies between {smallest:g} and {largest:g}, and its own value, "
            f"{own_value:g}, is on the curve; choose a range that holds it."
        )
    if points is None:
        points = DEFAULT_POINTS if plan.target_epsilon is None else DEFAULT_CALIBRATED_POINTS
    if not 2 <= points <= MAX_POINTS:
        raise ValueError(f"points={points}: a curve has between 2 and {MAX_POINTS} of them.")
    values = [float(f"{value:.6g}") for value in np.geomspace(low, high, points)]
    if against in WHOLE:
        values = [round(value) for value in values]
    return tuple(sorted({own_value, *(value for value in values if not math.isclose(value, own_value, rel_tol=1e-5))}))


def compute_curve(plan: Plan, against: str, values: Sequence[float]) -> Curve:
    """Account for `plan` with each of `values` in place of its field `against`, and return the trade-off.

    A value is left out where no epsilon can be stated for it: epsilon would exceed 1000, or no noise meets the target.

    Args:
        plan: the plan, whose own point is on the curve too.
        against: the name of the field that changes: `max_steps`, `expected_batch_size`, `noise_multiplier` or
            `target_epsilon`.
        values: the values of the field.

    Raises:
        ValueError: no epsilon can be stated for the plan itself, or for any other of the values.

    >>> plan = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000)
    >>> [round(point.guarantee.epsilon, 2) for point in compute_curve(plan, "max_steps", [250, 4000]).points]
    [0.87, 1.7, 3.56]
    """
    plan_point = account_for_plan(plan)
    own_value = getattr(plan, against)
    lower = list(_compute_points(plan, against, sorted((value for value in values if value < own_value), reverse=True)))
    higher = list(_compute_points(plan, against, sorted(value for value in values if value > own_value)))
    if not lower and not higher:
        raise ValueError(
            f"against={against}: an epsilon can be stated for {own_value:g} alone; "
            "choose other values with from and to."
        )
    points = (*reversed(lower), plan_point, *higher)
    num_left_out = len({own_value, *values}) - len(points)
    return Curve(against=against, plan_point=plan_point, points=points, num_left_out=num_left_out)


def _compute_points(plan: Plan, against: str, values: Sequence[float]) -> Iterator[CurvePoint]:
    """Yield the points of `values`, which lead away from the plan's, until no epsilon can be stated for one.

    The guarantee, and the noise for a target, are monotone in the field. So no epsilon can be stated beyond that value
    either, and finding that out takes minutes, because privacy loss distributions are wide there.
    """
    for value in values:
        try:
            yield account_for_plan(replace(plan, **{against: value}))
        except ValueError:
            return
