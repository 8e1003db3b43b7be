"""What a ledger amounts to: for each unit of privacy the runs, one by one and together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hf_dpzo.data_ledger.data_ledger import DataLedger, compose
from hf_dpzo.data_ledger.entries import BEGUN, ENDED, PLANNED, WITHDRAWN, EnteredRun, Entries, SetBudget
from hf_dpzo.data_ledger.overlap import describe_overlap, find_shared_sets
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.privacy.accounting import check_delta


# Composing after each run would take minutes for a hundred runs. As many sums, the last among them, draw the course.
MAX_SUMS = 12


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """A run, and what it comes to.

    Args:
        run: the run.
        alone: what it comes to by itself.
        after: what all runs up to this one come to; `None` where that was left out.
        rows: how its rows lie to those of earlier runs, in words. It depends on the rows.
    """

    run: EnteredRun
    alone: Total
    after: Total | None
    rows: str

    @property
    def state(self) -> str:
        """The state of the run, in words."""
        planned = self.run.plan.planned_steps
        steps = min(self.run.steps, planned)  # A copy that went on has the steps of its original, too.
        return {
            PLANNED: "entered; no step was seen",
            BEGUN: f"going on, or killed; {steps} of {planned} steps seen",
            ENDED: f"ended after {steps} of {planned} steps",
            WITHDRAWN: "ended before its first step: it released nothing",
        }[self.run.state]


@dataclass(frozen=True, kw_only=True)
class UnitSummary:
    """The runs that protect the same unit of privacy, together with those that protect none.

    Args:
        total: what they come to if each unit was in all of them, as a budget and cards take it.
        most_affected: what those come to that one unit can have been in, by the digests of the units.
        lines: the runs, those that were withdrawn among them.
    """

    total: Total
    most_affected: Total
    lines: tuple[RunLine, ...]

    @property
    def unit(self) -> str:
        """The word for a unit of privacy."""
        return "row" if self.total.unit_column is None else "user"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that a ledger says.

    Args:
        name: the name of its file.
        entries: what it holds.
        units: a summary for each unit of privacy, that of rows first.
    """

    name: str
    entries: Entries
    units: tuple[UnitSummary, ...]

    @classmethod
    def of(cls, ledger: DataLedger, *, delta: float | None = None) -> Self:
        """Compose the runs of `ledger`.

        Args:
            ledger: the ledger.
            delta: the delta at which epsilon is stated; by default that of the budget, or the smallest of the runs'.
        """
        entries = ledger.read()
        if delta is not None:
            check_delta(delta, num_rows=max((run.plan.num_units for run in entries.counted), default=None))
        # The largest epsilon has no say where only the delta is asked for.
        asked = entries.budget if delta is None else SetBudget(set_at="", epsilon=1.0, delta=delta)
        columns = {run.plan.unit_column for run in entries.runs if run.plan.private}
        columns = columns or {run.plan.unit_column for run in entries.runs} or {None}
        ordered = sorted(columns, key=lambda column: (column is not None, column or ""))
        return cls(
            name=ledger.path.name,
            entries=entries,
            units=tuple(_summarize(ledger, entries, column, asked) for column in ordered),
        )

    @property
    def keeps_budget(self) -> bool:
        """Whether no budget was set, or all runs together are within it."""
        budget = self.entries.budget
        return budget is None or all(
            compose([run.plan for run in self.entries.counted], budget, unit_column=unit.total.unit_column).epsilon
            <= budget.epsilon
            for unit in self.units
        )


def _summarize(ledger: DataLedger, entries: Entries, column: str | None, asked: SetBudget | None) -> UnitSummary:
    runs = [run for run in entries.runs if run.plan.unit_column == column or not run.plan.private]
    counted = [run for run in runs if run.counts]
    total = compose([run.plan for run in entries.counted], asked, unit_column=column)

    def add_up(some: Sequence[EnteredRun]) -> Total:
        return Total.of([run.plan for run in some], delta=total.delta, unit_column=column)

    members = ledger.read_members()
    held = {run.data_set: members[run.data_set] for run in counted}
    shared = [add_up([run for run in counted if run.data_set in one]) for one in find_shared_sets(held)]
    stride = -(-len(counted) // MAX_SUMS) or 1
    lines = []
    for run in runs:
        before = [one for one in counted if one.number <= run.number]
        is_summed = run.counts and (len(counted) - len(before)) % stride == 0
        after = add_up(before) if is_summed else None
        earlier = [members[one.data_set] for one in runs if one.number < run.number]
        rows = describe_overlap(earlier, members[run.data_set])
        lines.append(RunLine(run=run, alone=add_up([run]), after=after, rows=rows))
    most = max(shared, key=lambda one: (one.epsilon, one.runs), default=total)
    return UnitSummary(total=total, most_affected=most, lines=tuple(lines))
