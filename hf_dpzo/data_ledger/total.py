"""What several runs on the same rows come to together, by the project's accountants."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from hf_dpzo.card.claim import FALSE_ALARMS
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.interpretation import detection_rate, membership_accuracy
from hf_dpzo.privacy.queries import NonPrivateQuery, Query, Releases
from hf_dpzo.privacy.rounding import round_up


@dataclass(frozen=True, kw_only=True)
class Total:
    """The runs that are composed, and what they release together.

    Args:
        releases: all that they plan to release.
        runs: the number of runs.
        without_noise: the number of those that add no noise, for which no epsilon holds.
        of_other_units: the number of runs that protect another unit, and are not composed with these.
        delta: the delta at which epsilon is stated; `None` where no run has one.
        unit_column: the column that says whose a row is; `None` if the unit of privacy is a row.
    """

    releases: Releases
    runs: int
    without_noise: int
    of_other_units: int
    delta: float | None
    unit_column: str | None

    @classmethod
    def of(cls, runs: Sequence[PlannedRun], *, delta: float | None, unit_column: str | None) -> Self:
        """Compose those of `runs` that protect the unit of `unit_column`. Runs without noise concern all units.

        >>> from hf_dpzo.privacy import GaussianQuery
        >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01)
        >>> facts = {"delta": 1e-5, "unit_column": None, "num_units": 900, "method": "dpzero", "folder": "out"}
        >>> run = PlannedRun(releases=((query, 500),), **facts)
        >>> total = Total.of([run, run], delta=1e-5, unit_column=None)
        >>> total.releases[0][1], round(total.epsilon, 3)
        (1000, 1.828)
        """
        composed = [run for run in runs if run.unit_column == unit_column or not run.private]
        return cls(
            releases=_merge(release for run in composed for release in run.releases),
            runs=len(composed),
            without_noise=sum(not run.private for run in composed),
            of_other_units=len(runs) - len(composed),
            delta=delta,
            unit_column=unit_column,
        )

    @property
    def private(self) -> bool:
        """Whether an epsilon holds for all of the runs together."""
        return self.without_noise == 0

    @cached_property
    def epsilon(self) -> float:
        """The epsilon of all of the runs together, an upper bound; infinite where one adds no noise."""
        if not self.releases:
            return 0.0
        return math.inf if not self.private or self.delta is None else account(self.releases, delta=self.delta).epsilon

    @property
    def membership_accuracy(self) -> float:
        """How often the best guess whether a unit was used is right at most, from even odds."""
        if not self.releases:
            return 0.5
        return min(1.0, membership_accuracy(self.releases, delta=self.delta)) if math.isfinite(self.epsilon) else 1.0

    @property
    def detection_rate(self) -> float:
        """The share of used units that an attacker detects at most, with one false alarm in a hundred."""
        if not self.releases:
            return FALSE_ALARMS
        if not math.isfinite(self.epsilon):
            return 1.0
        return min(1.0, detection_rate(self.releases, delta=self.delta, false_alarms=FALSE_ALARMS))

    def for_card(self) -> dict[str, int | float | None]:
        """Return what a card publishes. It follows from public plans alone, and from no row."""
        epsilon = self.epsilon if math.isfinite(self.epsilon) else None
        return {
            "runs": self.runs + self.of_other_units,
            "without_noise": self.without_noise,
            "of_other_units": self.of_other_units,
            "epsilon": None if epsilon is None else round_up(epsilon),
            "delta": None if epsilon is None else self.delta,
        }


def describe_epsilon(epsilon: float | None) -> tuple[str, str]:
    """Return a line of a table with the epsilon of all runs on the same rows, as `Total.for_card` has it.

    >>> describe_epsilon(1.5), describe_epsilon(None)
    (('epsilon of all of them', '1.5'), ('epsilon of all of them', 'none: some add no noise'))
    """
    return "epsilon of all of them", "none: some add no noise" if epsilon is None else f"{epsilon:g}"


def _merge(releases: Iterable[tuple[Query, int]]) -> Releases:
    """Count equal queries together, whose order has no say in what they come to."""
    counts: dict[Query, int] = {}
    for query, count in releases:
        counts[query] = counts.get(query, 0) + count
    return tuple(sorted(counts.items(), key=lambda item: _sort_key(item[0])))


def _sort_key(query: Query) -> tuple:
    if isinstance(query, NonPrivateQuery):
        return (type(query).__name__,)
    return type(query).__name__, query.noise_multiplier, query.sampling_rate
