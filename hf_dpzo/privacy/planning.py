"""What a plan costs, and how that changes with its steps, its batch size, its noise or its target.

Pure accounting: no data, no model. A curve is made of points, each of them computed as for a single plan.
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
from hf_dpzo.privacy.ledger import round_up
from hf_dpzo.privacy.queries import MAX_NOISE_MULTIPLIER, QUERIES, GaussianQuery, LaplaceQuery, Releases


# Whole numbers among the fields of a plan.
WHOLE = ("max_steps", "expected_batch_size")


# How far to both sides a curve reaches by default: by this factor.
DEFAULT_REACH = {"max_steps": 10.0, "expected_batch_size": 10.0, "noise_multiplier": 4.0, "target_epsilon": 4.0}


# To calibrate takes seconds a point.
DEFAULT_POINTS, DEFAULT_CALIBRATED_POINTS, MAX_POINTS = 13, 7, 200


# More than any run takes.
_MOST_STEPS = 10**9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that is planned: how often it releases what, from how many rows.

    Args:
        noise: `gaussian` or `laplace`.
        noise_multiplier: the noise's scale over the sensitivity; `None` for the least that meets `target_epsilon`.
        target_epsilon: the target at `target_delta`, for Laplace noise at delta 0; `None` where the noise is given.
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
        """What one step releases. Raises `ValueError` where no noise meets the target."""
        given = 1.0 if self.noise_multiplier is None else self.noise_multiplier
        query = QUERIES[self.noise](noise_multiplier=given, sampling_rate=self.expected_batch_size / self.num_rows)
        if self.target_epsilon is None:
            return query
        return calibrate_query(
            query, steps=self.max_steps, target_epsilon=self.target_epsilon, target_delta=self.target_delta
        )


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A plan, what each of its steps releases, and the guarantee for all of them.

    Args:
        plan: the plan, with its noise or its target.
        query: what one step releases, with the noise that the plan gives or that meets its target.
        guarantee: upper bounds on the epsilon of all steps.

    >>> plan = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000)
    >>> compute_curve(plan, "max_steps", [500]).plan_point.as_row()["noise_multiplier"]
    1.2
    """

    plan: Plan
    query: GaussianQuery | LaplaceQuery
    guarantee: Guarantee

    @property
    def releases(self) -> Releases:
        """All that the plan releases."""
        return ((self.query, self.plan.max_steps),)

    def group_epsilon(self, rows_per_person: int) -> float:
        """Return epsilon, at the plan's delta, for a person with so many rows; for Laplace noise at delta 0.

        Raises:
            ValueError: there are too many rows to account for, or none.
        """
        check_group(rows_per_person)
        return account_for_group(self.releases, size=rows_per_person, delta=self.guarantee.delta)

    def as_row(self) -> dict[str, str | float | None]:
        """The point as a line of a table. Bounds are rounded up, and `None` where an accountant does not apply."""
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
    """What changes if one field of a plan does.

    Args:
        against: the name of the field.
        plan_point: the plan's own point.
        points: the points in the order of the field, `plan_point` among them.
        num_left_out: the number of values of the field for which no epsilon can be stated.

    >>> plan = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000)
    >>> found = compute_curve(plan, "max_steps", [500])
    >>> [found.value_at(point) for point in found.points]
    [500, 1000]
    """

    against: str
    plan_point: CurvePoint
    points: tuple[CurvePoint, ...]
    num_left_out: int

    def value_at(self, point: CurvePoint) -> float:
        """The value of the field at `point`."""
        return getattr(point.plan, self.against)


def check_group(rows_per_person: int) -> None:
    """Raise `ValueError` where a person can not have so many rows, or has more than are accounted for."""
    if not (isinstance(rows_per_person, Integral) and 1 <= rows_per_person <= MAX_GROUP_SIZE):
        raise ValueError(f"rows_per_person={rows_per_person}: it must lie between 1 and {MAX_GROUP_SIZE}.")


def account_for_plan(plan: Plan) -> CurvePoint:
    """Account for `plan`, or raise `ValueError` where no epsilon can be stated for it.

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
    """Return values of the field `against` in equal ratios from `low` to `high`, with the plan's own one among them.

    By default they reach by the factor `DEFAULT_REACH` to both sides. They are rounded to six digits, and steps and
    rows to whole numbers, so that there may be fewer than `points`.

    >>> plan = Plan(noise_multiplier=1.0, target_delta=1e-5, num_rows=5000, expected_batch_size=50, max_steps=1000)
    >>> choose_values(plan, "max_steps", low=10, points=4)
    (10, 100, 1000, 10000)
    """
    asked = getattr(plan, against)
    ends = {"max_steps": _MOST_STEPS, "expected_batch_size": plan.num_rows, "noise_multiplier": MAX_NOISE_MULTIPLIER}
    smallest, largest = 1 if against in WHOLE else 0, ends.get(against, math.inf)
    low = max(smallest, asked / DEFAULT_REACH[against]) if low is None else low
    high = min(largest, asked * DEFAULT_REACH[against]) if high is None else high
    if not (0 < low < high < math.inf and smallest <= low <= asked <= high <= largest):
        raise ValueError(
            f"from={low:g}, to={high:g}: {against} lies between {smallest:g} and {largest:g}, and its own value, "
            f"{asked:g}, is on the curve; choose a range that holds it."
        )
    if points is None:
        points = DEFAULT_POINTS if plan.target_epsilon is None else DEFAULT_CALIBRATED_POINTS
    if not 2 <= points <= MAX_POINTS:
        raise ValueError(f"points={points}: a curve has between 2 and {MAX_POINTS} of them.")
    values = [float(f"{value:.6g}") for value in np.geomspace(low, high, points)]
    if against in WHOLE:
        values = [round(value) for value in values]
    return tuple(sorted({asked, *(value for value in values if not math.isclose(value, asked, rel_tol=1e-5))}))


def compute_curve(plan: Plan, against: str, values: Sequence[float]) -> Curve:
    """Account for `plan` with each of `values` in place of its field `against`, and return the trade-off.

    Values for which no epsilon can be stated are left out: those that would cost more than 1000, and targets that no
    noise meets.

    Args:
        plan: the plan; its own point is on the curve, too.
        against: the name of the field that changes: `max_steps`, `expected_batch_size`, `noise_multiplier` or
            `target_epsilon`.
        values: the values of the field.

    Raises:
        ValueError: an epsilon can be stated for none of the values, or not for the plan itself.

    >>> plan = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=1000)
    >>> [round(point.guarantee.epsilon, 2) for point in compute_curve(plan, "max_steps", [250, 4000]).points]
    [0.87, 1.7, 3.56]
    """
    asked = account_for_plan(plan)
    place = getattr(plan, against)
    lower = list(_compute_points(plan, against, sorted((value for value in values if value < place), reverse=True)))
    higher = list(_compute_points(plan, against, sorted(value for value in values if value > place)))
    if not lower and not higher:
        raise ValueError(
            f"against={against}: an epsilon can be stated for {place:g} alone; choose other values with from and to."
        )
    points = (*reversed(lower), asked, *higher)
    return Curve(against=against, plan_point=asked, points=points, num_left_out=len({place, *values}) - len(points))


def _compute_points(plan: Plan, against: str, values: Sequence[float]) -> Iterator[CurvePoint]:
    """The points of `values`, which lead away from the plan, up to the first for which no epsilon can be stated.

    What all depends on is monotone, so none can be stated beyond it either; and to find out there, where privacy loss
    distributions are wide, takes minutes.
    """
    for value in values:
        try:
            yield account_for_plan(replace(plan, **{against: value}))
        except ValueError:
            return
