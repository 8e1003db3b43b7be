"""The ledger of a data set, as runs and people use it: entered before the first step, composed, kept to a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from hf_dpzo.data_ledger.entries import (
    PLANNED,
    WITHDRAWN,
    EnteredRun,
    Entries,
    SetBudget,
    read_entries,
    read_members,
    tell_time,
    write_budget,
    write_members,
    write_run,
)
from hf_dpzo.data_ledger.members import Members
from hf_dpzo.data_ledger.place import DataLedgerError, refuse_place
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.refusal import Wish, refuse_run
from hf_dpzo.data_ledger.store import Store
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.privacy.accounting import check_delta
from hf_dpzo.privacy.ledger import Budget


class _ChangedMeanwhileError(Exception):
    """Another process has entered a run since this one looked."""


class DataLedger:
    """The ledger at `path`: all runs on the same rows, as planned, of which none is ever taken out.

    Guarantee: a run that this class has entered is on disk, and stays there if the process is killed. Runs that are
    entered at the same time by several processes are all kept, and pass the budget together only if they are within it.

    Args:
        path: the path of the ledger.
        create: whether to begin a ledger if there is none.

    Raises:
        DataLedgerError: it is not there, is damaged or of another program, or lies where it cannot be kept.

    >>> import tempfile
    >>> from hf_dpzo.privacy import GaussianQuery
    >>> ledger = DataLedger(Path(tempfile.mkdtemp()) / "data.ledger", create=True)
    >>> plan = Budget(query=GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01), planned_steps=1000, delta=1e-5)
    >>> total = ledger.preview(plan, num_units=6400)
    >>> total.runs, round(total.epsilon, 3)
    (1, 1.828)
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path).expanduser()
        refuse_place(self.path)
        self._store = Store(self.path, create=create)

    @classmethod
    def for_run(cls, path: str | Path, output_dir: str | Path) -> Self:
        """Return the ledger at `path`, begun if there is none, for a run in `output_dir`."""
        refuse_place(Path(path).expanduser(), output_dir=Path(output_dir))
        return cls(path, create=True)

    # ---- Looks ----

    def read(self) -> Entries:
        """Return all entries."""
        with self._store.reading() as connection:
            return read_entries(self._store, connection)

    def read_members(self) -> Mapping[int, Members]:
        """Return the digests of the units of each data set, by its number. SENSITIVE."""
        with self._store.reading() as connection:
            return read_members(self._store, connection, read_entries(self._store, connection).key)

    def preview(self, budget: Budget, *, unit_column: str | None = None, num_units: int, name: str = "") -> Total:
        """Return what all runs on these rows would come to with one more, and enter nothing.

        Args:
            budget: the plan of the run.
            unit_column: the column that says whose a row is; `None` if the unit of privacy is a row.
            num_units: the number of units of privacy.
            name: the name of its entry, if it has one, in whose place it comes.
        """
        entries = self.read()
        run = PlannedRun.from_budget(budget, unit_column=unit_column, num_units=num_units)
        others = [entered.plan for entered in entries.counted if entered.name != name]
        return compose([*others, run], entries.budget, unit_column=unit_column)

    def refuse(self, wish: Wish) -> None:
        """Raise `BudgetExceededError` if what is wished would pass the budget. Nothing is entered."""
        entries = self.read()
        refuse_run(self.path, entries.budget, [entered.plan for entered in entries.counted], wish)

    # ---- Entries ----

    def set_budget(self, *, epsilon: float, delta: float | None = None) -> None:
        """Set the most that all runs together may come to. Earlier budgets stay in the ledger, and in its report.

        Args:
            epsilon: the largest epsilon.
            delta: the delta at which it is stated; by default that of the budget before, or the smallest of the runs'.
        """
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise DataLedgerError(f"budget={epsilon:g}: an epsilon is above 0; set what these data may be used up for.")
        entries = self.read()
        counted = entries.counted
        if delta is None:
            before = [entries.budget.delta] if entries.budget else [run.plan.delta for run in counted if run.plan.delta]
            delta = min(before, default=None)
        if delta is None:
            raise DataLedgerError(
                f"budget={epsilon:g}: an epsilon is stated at a delta, and no run has one yet; add --delta, such as "
                "1e-6."
            )
        check_delta(delta, num_rows=max((run.plan.num_units for run in counted), default=None))
        if len({run.plan.unit_column for run in counted if run.plan.private}) > 1:
            raise DataLedgerError(
                f"budget={epsilon:g}: the runs of this ledger protect different units, whose epsilons do not add up, "
                "so that no budget can be kept; keep a ledger for each unit."
            )
        with self._store.writing() as connection:
            write_budget(connection, epsilon=epsilon, delta=delta, key=read_entries(self._store, connection).key)

    def enter(self, wish: Wish, members: Members, *, name: str, is_released: bool = False) -> Total:
        """Enter a run as it is planned, before its first step, and return what all runs then come to.

        A run of that name is the same entry: it counts once, with the larger of both plans once it has begun.

        Args:
            wish: the run, as it is planned.
            members: its units of privacy, by the key of this ledger.
            name: what its folder calls it.
            is_released: whether it was made already, so that it is too late for a refusal.

        Raises:
            BudgetExceededError: all runs together would pass the budget. Nothing is entered then.
        """
        while True:
            entries = self.read()
            known = entries.find(name)
            run = _join(wish.run, known)
            others = [entered.plan for entered in entries.counted if entered.name != name]
            if not is_released and not _is_counted(run, known):
                refuse_run(self.path, entries.budget, others, wish.changed(partial(_join, known=known)))
            try:
                self._write_entry(run, members, name, looked=entries)
            except _ChangedMeanwhileError:
                continue
            return compose([*others, run], entries.budget, unit_column=run.unit_column)

    def _write_entry(self, run: PlannedRun, members: Members, name: str, *, looked: Entries) -> None:
        with self._store.writing() as connection:
            now = read_entries(self._store, connection)
            if now.revision != looked.revision:
                raise _ChangedMeanwhileError
            known = now.find(name)
            entry = EnteredRun(
                number=known.number if known else len(now.runs) + 1,
                name=name,
                entered_at=known.entered_at if known else tell_time(),
                state=known.state if known and known.state != WITHDRAWN else PLANNED,
                plan=run,
                data_set=write_members(connection, members, now.key),
                steps=known.steps if known else 0,
                checksum=known.checksum if known else None,
            )
            write_run(connection, entry, now.key)

    def note(
        self, name: str, *, state: str, steps: int = 0, checksum: str | None = None, base_model: str | None = None
    ) -> None:
        """Note how far a run has come, which changes nothing of what it counts for, unless it is withdrawn.

        Raises:
            DataLedgerError: the ledger is not there any more, or does not hold the run.
        """
        with self._store.writing() as connection:
            now = read_entries(self._store, connection)
            known = now.find(name)
            if known is None:
                raise DataLedgerError(
                    f"privacy_ledger={self.path}: it does not hold the entry of this run; bring back the one that does."
                )
            plan = replace(known.plan, base_model=base_model or known.plan.base_model)
            changed = replace(known, state=state, steps=steps, checksum=checksum or known.checksum, plan=plan)
            write_run(connection, changed, now.key)


def compose(runs: Sequence[PlannedRun], budget: SetBudget | None, *, unit_column: str | None) -> Total:
    """Return what `runs` come to at the delta of the budget, or else at the smallest of their own."""
    own = [run.delta for run in runs if run.delta is not None and run.unit_column == unit_column]
    delta = min(own, default=None) if budget is None else budget.delta
    return Total.of(runs, delta=delta, unit_column=unit_column)


def _join(plan: PlannedRun, known: EnteredRun | None) -> PlannedRun:
    """Return the plan that counts: a run that has begun cannot be planned smaller."""
    return plan if known is None or known.state in (PLANNED, WITHDRAWN) else plan.joined_with(known.plan)


def _is_counted(plan: PlannedRun, known: EnteredRun | None) -> bool:
    """Return whether the entry of a run covers all that it plans, so that going on with it costs nothing."""
    return (
        known is not None and known.state not in (PLANNED, WITHDRAWN) and set(plan.releases) <= set(known.plan.releases)
    )
