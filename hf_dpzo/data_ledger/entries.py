"""The entries of a ledger: runs, data sets and budgets, each under a seal that shows a changed byte."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hf_dpzo.data_ledger.members import Members
from hf_dpzo.data_ledger.place import DataLedgerError
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.store import Store


# The states of a run. One that is withdrawn ended before its first release, and costs nothing.
PLANNED, BEGUN, ENDED, WITHDRAWN = "planned", "begun", "ended", "withdrawn"


@dataclass(frozen=True, kw_only=True)
class EnteredRun:
    """A run as the ledger holds it.

    Args:
        number: its number, in the order of entries, which no clock has a say in.
        name: what its folder calls it.
        entered_at: the time by the machine's clock.
        state: planned, begun, ended or withdrawn.
        plan: what it plans to release.
        data_set: the number of its data set.
        steps: the steps that its log held when it was last looked at.
        checksum: the checksum of the log after these steps; `None` before there was a log.
    """

    number: int
    name: str
    entered_at: str
    state: str
    plan: PlannedRun
    data_set: int
    steps: int
    checksum: str | None

    @property
    def counts(self) -> bool:
        """Whether it may have released something, or may yet."""
        return self.state != WITHDRAWN


@dataclass(frozen=True, kw_only=True)
class SetBudget:
    """A budget, and when it was set.

    Args:
        set_at: the time by the machine's clock.
        epsilon: the most that all runs together may come to.
        delta: the delta at which that is stated.
    """

    set_at: str
    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Entries:
    """All entries of a ledger, as they were at one time.

    Args:
        identity: what tells the ledger from others, a random public text.
        key: the secret key of the digests.
        revision: a number that grows with each entry.
        runs: the runs, in the order in which they were entered.
        budgets: the budgets, in the order in which they were set; the last one holds.
    """

    identity: str
    key: bytes
    revision: int
    runs: tuple[EnteredRun, ...]
    budgets: tuple[SetBudget, ...]

    @property
    def budget(self) -> SetBudget | None:
        """The budget that holds; `None` if none was set."""
        return self.budgets[-1] if self.budgets else None

    @property
    def counted(self) -> list[EnteredRun]:
        """The runs that may have released something, or may yet."""
        return [run for run in self.runs if run.counts]

    def find(self, name: str | None) -> EnteredRun | None:
        """Return the run that its folder calls `name`; `None` if it is not in this ledger."""
        return next((run for run in self.runs if run.name == name), None)


def read_entries(store: Store, connection: sqlite3.Connection) -> Entries:
    """Read all entries but the digests; raise `DataLedgerError` for one that is not as it was written."""
    values = dict(connection.execute("SELECT name, value FROM ledger"))
    try:
        key, identity, revision = bytes(values["key"]), str(values["identity"]), int(values["revision"])
        runs = tuple(
            _read_run(row, key) for row in connection.execute(f"SELECT {_COLUMNS}, seal FROM runs ORDER BY id")
        )
        budgets = tuple(
            _read_budget(row, key) for row in connection.execute("SELECT set_at, epsilon, delta, seal FROM budgets")
        )
        if [run.number for run in runs] != [*range(1, len(runs) + 1)]:
            raise ValueError("an entry is missing")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataLedgerError):
            raise
        raise store.build_damage("an entry is not as it was written") from error
    return Entries(identity=identity, key=key, revision=revision, runs=runs, budgets=budgets)


_COLUMNS = "id, name, entered_at, state, plan, data_set, steps, checksum"


def _read_run(row: tuple, key: bytes) -> EnteredRun:
    *values, seal = row
    if _seal(values, key) != seal:
        raise ValueError("seal")
    number, name, entered_at, state, plan, data_set, steps, checksum = values
    return EnteredRun(
        number=number,
        name=name,
        entered_at=entered_at,
        state=state,
        plan=PlannedRun.from_json(plan),
        data_set=data_set,
        steps=steps,
        checksum=checksum,
    )


def _read_budget(row: tuple, key: bytes) -> SetBudget:
    *values, seal = row
    if _seal(values, key) != seal:
        raise ValueError("seal")
    return SetBudget(set_at=values[0], epsilon=values[1], delta=values[2])


def write_run(connection: sqlite3.Connection, run: EnteredRun, key: bytes) -> None:
    """Write a new run, or another state of one that is there."""
    values = [run.number, run.name, run.entered_at, run.state, run.plan.as_json(), run.data_set, run.steps]
    values.append(run.checksum)
    connection.execute(
        f"INSERT OR REPLACE INTO runs ({_COLUMNS}, changed_at, seal) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [*values, tell_time(), _seal(values, key)],
    )


def write_budget(connection: sqlite3.Connection, *, epsilon: float, delta: float, key: bytes) -> None:
    """Set the budget that holds from here on."""
    values = [tell_time(), float(epsilon), float(delta)]
    connection.execute(
        "INSERT INTO budgets (set_at, epsilon, delta, seal) VALUES (?, ?, ?, ?)", [*values, _seal(values, key)]
    )


def write_members(connection: sqlite3.Connection, members: Members, key: bytes) -> int:
    """Return the number of the data set with these units, which is entered if it is new."""
    identity = members.identity(key)
    found = connection.execute("SELECT id FROM data_sets WHERE identity = ?", [identity]).fetchone()
    if found is not None:
        return found[0]
    values = [identity, members.form, members.as_bytes()]
    return connection.execute("INSERT INTO data_sets (identity, form, members) VALUES (?, ?, ?)", values).lastrowid


def read_members(store: Store, connection: sqlite3.Connection, key: bytes) -> Mapping[int, Members]:
    """Return the units of each data set, by its number. SENSITIVE."""
    found = {}
    for number, identity, form, digests in connection.execute("SELECT id, identity, form, members FROM data_sets"):
        found[number] = Members.from_bytes(form, digests)
        if found[number].identity(key) != identity:
            raise store.build_damage("the digests of a data set are not as they were written")
    return found


def _seal(values: list[Any], key: bytes) -> bytes:
    return hashlib.blake2b(json.dumps(values).encode(), key=key, digest_size=16).digest()


def tell_time() -> str:
    """Return the time by the machine's clock, which only people read."""
    return datetime.now(UTC).isoformat(timespec="seconds")
