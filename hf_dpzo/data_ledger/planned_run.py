"""What a run plans to release from the rows of a ledger, as the ledger keeps it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.queries import QUERY_CLASSES, GaussianQuery, LaplaceQuery, NonPrivateQuery, Query, Releases


_QUERIES = {**QUERY_CLASSES, NonPrivateQuery.__name__: NonPrivateQuery}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run as it is planned, all of which counts, whether the run comes to its end or not.

    Args:
        releases: its own releases, without those of other trials and earlier runs, which have entries of their own.
        delta: the delta that it was planned with; `None` for a run without noise.
        unit_column: the column that says whose a row is; `None` if the unit of privacy is a row.
        num_units: the number of units of privacy, a public number.
        method: the name of its method.
        folder: its `output_dir`, as an absolute path.
        base_model: the name of the model that it began with; `None` if it is not known yet.
    """

    releases: Releases
    delta: float | None
    unit_column: str | None
    num_units: int
    method: str
    folder: str
    base_model: str | None = None

    @classmethod
    def from_budget(
        cls, budget: Budget, *, unit_column: str | None, num_units: int, method: str = "", folder: str = ""
    ) -> Self:
        """Return the run that `budget` plans."""
        return cls(
            releases=own_releases(budget),
            delta=budget.delta,
            unit_column=unit_column,
            num_units=num_units,
            method=method,
            folder=folder,
        )

    @property
    def private(self) -> bool:
        """Whether all that it releases holds noise."""
        return not any(isinstance(query, NonPrivateQuery) for query, _ in self.releases)

    @property
    def planned_steps(self) -> int:
        """The number of its planned releases, a count of failing rows among them."""
        return sum(count for _, count in self.releases)

    def without_steps(self, steps: int) -> Self:
        """Return the run of which `steps` steps were released by another one.

        >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.1)
        >>> facts = {"delta": 1e-5, "unit_column": None, "num_units": 9, "method": "dpzero", "folder": "out"}
        >>> PlannedRun(releases=((query, 5),), **facts).without_steps(2).planned_steps
        3
        """
        (query, count), *others = self.releases
        left = max(0, count - steps)
        return replace(self, releases=(*(((query, left),) if left else ()), *others))

    def joined_with(self, other: Self) -> Self:
        """Return this run, with the larger plan of both, since a smaller one gives nothing back."""
        counts = dict(self.releases)
        for query, count in other.releases:
            counts[query] = max(count, counts.get(query, 0))
        return replace(self, releases=tuple(counts.items()), base_model=self.base_model or other.base_model)

    def as_json(self) -> str:
        """Return all fields as JSON."""
        releases = [[type(query).__name__, asdict(query), count] for query, count in self.releases]
        return json.dumps(asdict(self) | {"releases": releases}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the run that `as_json` wrote; raise `ValueError`, `KeyError` or `TypeError` for other text."""
        values: Mapping[str, Any] = json.loads(text)
        releases = tuple((_build_query(name, fields), int(count)) for name, fields, count in values["releases"])
        return cls(**{**values, "releases": releases})


def own_releases(budget: Budget) -> Releases:
    """Return what a run with `budget` itself plans to release: its steps, and its count of failing rows.

    >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.1)
    >>> three_trials = Budget(query=query, planned_steps=5, delta=1e-5, trials=3)
    >>> [count for _, count in own_releases(three_trials)]
    [5]
    """
    return ((budget.query, budget.planned_steps), *((query, -(-n // budget.trials)) for query, n in budget.report))


def _build_query(name: str, fields: Mapping[str, float]) -> Query:
    kind: type[GaussianQuery] | type[LaplaceQuery] | type[NonPrivateQuery] = _QUERIES[name]
    return kind(**fields)
