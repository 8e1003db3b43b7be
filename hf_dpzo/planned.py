"""A run as its log describes it: the method, the update, the plan and what of it was spent."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_dpzo.header import differences
from hf_dpzo.ledger import Budget
from hf_dpzo.methods import METHODS, Method
from hf_dpzo.queries import Query
from hf_dpzo.replay import made
from hf_dpzo.trajectory import Trajectory, TrajectoryError
from hf_dpzo.updates import UPDATES, Update


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What follows from a log.

    Args:
        header: of the log.
        method: with its parameters.
        update: what became of released coefficients.
        budget: the plan, and the ledger of the steps that were taken.
    """

    header: Mapping[str, Any]
    method: Method
    update: Update
    budget: Budget

    @classmethod
    def of(cls, log: Trajectory) -> Self:
        """Return the run that `log` is of.

        Raises:
            TrajectoryError: it plans for releases that its method does not make.
        """
        header, plan = log.header, log.header["plan"]
        method = made(METHODS, header["method"])
        run = cls(
            header=header,
            method=method,
            update=made(UPDATES, header["update"]),
            budget=Budget(
                query=_query(header, method),
                planned_steps=plan["steps"],
                delta=plan["delta"],
                trials=plan.get("trials", 1),
            ),
        )
        run.budget.ledger.append(run.budget.query, count=min(plan["steps"], len(log.records) + (log.torn > 0)))
        return run

    @property
    def method_name(self) -> str:
        """The method's name in `METHODS`."""
        return self.header["method"]["name"]

    @property
    def rows(self) -> int:
        """How many rows the training data had."""
        return self.header["rows"]["rows"]

    @property
    def units(self) -> int:
        """How many units of privacy they made."""
        return self.header["rows"]["units"]

    @property
    def expected_batch_size(self) -> int:
        """Units in a batch, on average."""
        return self.header["rows"]["expected_batch_size"]

    @property
    def sampling_rate(self) -> float:
        """The probability with which each unit joined a batch."""
        return self.expected_batch_size / self.units

    @property
    def unit_column(self) -> str | None:
        """The column that says whose a row is; `None` where the unit is a row."""
        return self.header["rows"]["privacy_unit_column"]

    @property
    def max_rows_per_unit(self) -> int | None:
        """How many rows of a unit a batch held at most; `None` where the unit is a row."""
        return self.header["rows"]["max_rows_per_unit"]

    @property
    def padded_lengths(self) -> list[int] | None:
        """The public lengths that rows were padded to."""
        return self.header["rows"]["padded_lengths"]

    @property
    def unit_name(self) -> str:
        """What a unit of privacy is called."""
        return "row" if self.unit_column is None else "user"

    @property
    def unit_in_words(self) -> str:
        """What a unit of privacy is."""
        if self.unit_column is None:
            return "one row of the training data"
        return (
            f"all rows of one user (column {self.unit_column}), of which a batch holds at most "
            f"{self.max_rows_per_unit}, as one clipped mean"
        )


def _query(header: Mapping[str, Any], method: Method) -> Query:
    """What one step released, as the method says; not as the header does, which must agree."""
    rows, planned = header["rows"], header["plan"]["query"]
    query = method.mechanism.query(rows["expected_batch_size"] / rows["units"])
    different = differences(planned, {"name": type(query).__name__, **asdict(query)})
    if different:
        raise TrajectoryError(f"plan: it is not of {header['method']['name']}: {'; '.join(different[:3])}.")
    return query
