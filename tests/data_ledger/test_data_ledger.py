"""A ledger counts every run once, whatever happens to the processes, the clock, the folders and the file."""

import math
import os
import shutil
import sqlite3
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_dpzo.data_ledger import data_ledger, place
from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.place import DataLedgerError, find_network
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.refusal import Wish
from hf_dpzo.data_ledger.summary import Summary
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.ledger import Budget, BudgetExceededError
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery

from support.ledgers import NO_NOISE, QUERY, enter, in_child, kill, names_in, plan, units


OTHER = GaussianQuery(noise_multiplier=2.0, sampling_rate=0.02)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "data.ledger"


@pytest.fixture
def ledger(path) -> DataLedger:
    return DataLedger(path, create=True)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text.startswith(("privacy_ledger=", "budget=")) and text.endswith(".") and text.count("; ") >= 1
    return text


# ---- What runs come to ----


def test_runs_are_composed_by_their_mechanisms_not_by_their_epsilons(ledger):
    enter(ledger, "a", steps=300)
    enter(ledger, "b", steps=200, query=OTHER)
    enter(ledger, "c", steps=100)
    total = Summary.of(ledger).units[0].total
    assert total.epsilon == account(((QUERY, 400), (OTHER, 200)), delta=1e-5).epsilon
    alone = [
        account(((query, steps),), delta=1e-5).epsilon for query, steps in ((QUERY, 300), (OTHER, 200), (QUERY, 100))
    ]
    assert max(alone) < total.epsilon < sum(alone)


def test_a_delta_may_be_asked_for(ledger):
    enter(ledger, "a")
    assert Summary.of(ledger, delta=1e-4).units[0].total.epsilon == account(((QUERY, 100),), delta=1e-4).epsilon
    with pytest.raises(ValueError, match=r"^target_delta=0.5: with 900 rows"):
        Summary.of(ledger, delta=0.5)


def test_a_preview_enters_nothing(ledger):
    enter(ledger, "a")
    budget = Budget(query=OTHER, planned_steps=50, delta=1e-5)
    total = ledger.preview(budget, num_units=900)
    assert total.releases == ((QUERY, 100), (OTHER, 50)) and total.runs == 2
    assert ledger.preview(budget, num_units=900, name="a").runs == 1
    assert len(ledger.read().runs) == 1


def test_of_trials_and_reports_a_run_enters_its_own():
    budget = Budget(query=QUERY, planned_steps=7, delta=1e-5, trials=3, earlier=((OTHER, 9),), report=((OTHER, 3),))
    assert PlannedRun.from_budget(budget, unit_column=None, num_units=9).releases == ((QUERY, 7), (OTHER, 1))


@pytest.mark.parametrize("query", [QUERY, NO_NOISE, LaplaceQuery(noise_multiplier=0.1 + 0.2, sampling_rate=1 / 3)])
def test_what_is_read_back_is_what_was_entered(ledger, query):
    written = plan(query=query, unit_column='a "column"', folder="/models/\N{SNOWMAN}\n<b>")
    ledger.enter(Wish(run=written), units(5), name="a")
    assert ledger.read().runs[0].plan == written


def test_a_run_without_noise_leaves_no_epsilon_for_all_runs(ledger):
    enter(ledger, "a")
    enter(ledger, "b", query=NO_NOISE)
    total = Summary.of(ledger).units[0].total
    assert total.epsilon == math.inf and total.without_noise == 1 and total.membership_accuracy == 1
    assert total.for_card() == {"runs": 2, "without_noise": 1, "of_other_units": 0, "epsilon": None, "delta": None}


def test_epsilons_of_different_units_are_not_added_up(ledger):
    enter(ledger, "rows")
    enter(ledger, "users", unit_column="patient", query=OTHER)
    rows, users = Summary.of(ledger).units
    assert (rows.total.releases, users.total.releases) == (((QUERY, 100),), ((OTHER, 100),))
    assert rows.total.of_other_units == users.total.of_other_units == 1
    with pytest.raises(DataLedgerError, match="protect different units") as error:
        ledger.set_budget(epsilon=8, delta=1e-5)
    one_sentence(error)


# ---- Budgets ----


def test_a_run_beyond_the_budget_is_refused_and_one_within_it_is_entered(ledger):
    ledger.set_budget(epsilon=0.8, delta=1e-5)
    enter(ledger, "a", steps=100)
    with pytest.raises(
        BudgetExceededError, match=r"come to epsilon=.* at delta=1e-05, beyond their budget of 0.8;"
    ) as error:
        enter(ledger, "b", steps=300)
    fitting = int(one_sentence(error).partition("no more than ")[2].split()[0])
    assert [run.name for run in ledger.read().runs] == ["a"]
    enter(ledger, "c", steps=fitting)
    with pytest.raises(BudgetExceededError):
        enter(ledger, "d", steps=40)


def test_several_runs_that_are_planned_together_are_refused_together(ledger):
    ledger.set_budget(epsilon=account(((QUERY, 10),), delta=1e-5).epsilon, delta=1e-5)
    ledger.refuse(Wish(run=plan(steps=5), times=2))
    with pytest.raises(BudgetExceededError):
        ledger.refuse(Wish(run=plan(steps=5), times=3))


def test_with_a_budget_runs_without_noise_or_of_another_unit_are_refused(ledger):
    ledger.set_budget(epsilon=8, delta=1e-5)
    enter(ledger, "a")
    with pytest.raises(BudgetExceededError, match="method=mezo adds no noise") as error:
        enter(ledger, "b", query=NO_NOISE)
    one_sentence(error)
    with pytest.raises(BudgetExceededError, match="epsilons do not add up") as error:
        enter(ledger, "c", unit_column="patient")
    one_sentence(error)


def test_after_a_run_without_noise_no_budget_is_kept(ledger):
    enter(ledger, "a", query=NO_NOISE)
    ledger.set_budget(epsilon=8, delta=1e-5)
    assert not Summary.of(ledger).keeps_budget
    with pytest.raises(BudgetExceededError, match="1 of the runs on these data added no noise") as error:
        enter(ledger, "b")
    one_sentence(error)


def test_every_budget_that_was_set_is_kept_and_the_last_one_holds(ledger):
    for epsilon in (4, 8, 2):
        ledger.set_budget(epsilon=epsilon, delta=1e-5)
    assert [budget.epsilon for budget in ledger.read().budgets] == [4, 8, 2]
    assert ledger.read().budget.epsilon == 2


def test_a_budget_takes_the_delta_of_the_one_before_or_of_the_runs(ledger):
    with pytest.raises(DataLedgerError, match="add --delta") as error:
        ledger.set_budget(epsilon=8)
    one_sentence(error)
    enter(ledger, "a")
    ledger.set_budget(epsilon=8)
    ledger.set_budget(epsilon=8, delta=1e-6)
    ledger.set_budget(epsilon=4)
    assert [budget.delta for budget in ledger.read().budgets] == [1e-5, 1e-6, 1e-6]


@pytest.mark.parametrize("epsilon", [0, -1, math.nan, math.inf])
def test_a_budget_is_a_number_above_zero(ledger, epsilon):
    with pytest.raises(DataLedgerError, match="an epsilon is above 0"):
        ledger.set_budget(epsilon=epsilon, delta=1e-5)


# ---- The same run ----


def test_a_run_is_one_entry_and_its_plan_grows_only(ledger):
    enter(ledger, "a", steps=100)
    ledger.note("a", state="begun", steps=1, checksum="aa")
    enter(ledger, "a", steps=150)
    enter(ledger, "a", steps=50)
    (run,) = ledger.read().runs
    assert run.plan.releases == ((QUERY, 150),) and (run.state, run.steps) == ("begun", 1)


def test_a_raised_plan_is_checked_and_going_on_with_the_same_one_is_not(ledger):
    ledger.set_budget(epsilon=2.0, delta=1e-5)
    enter(ledger, "a", steps=10)
    ledger.note("a", state="begun", steps=3, checksum="aa")
    ledger.set_budget(epsilon=0.1, delta=1e-5)
    enter(ledger, "a", steps=10)  # All of it is counted already.
    with pytest.raises(BudgetExceededError):
        enter(ledger, "a", steps=11)


def test_a_run_that_released_nothing_costs_nothing(ledger):
    enter(ledger, "a")
    ledger.note("a", state="withdrawn")
    assert Summary.of(ledger).units[0].total.epsilon == 0
    enter(ledger, "a", steps=7)
    assert ledger.read().counted[0].plan.planned_steps == 7


def test_the_clock_has_no_say(ledger, monkeypatch):
    times = iter(["2030-01-01T00:00:00+00:00", "1970-01-01T00:00:00+00:00", "2031-01-01T00:00:00+00:00"])
    monkeypatch.setattr(data_ledger, "tell_time", lambda: next(times))
    for name in "abc":
        enter(ledger, name)
    assert [(run.number, run.name) for run in ledger.read().runs] == [(1, "a"), (2, "b"), (3, "c")]


# ---- Several processes, and killed ones ----


def test_processes_that_enter_at_the_same_time_are_all_counted(path):
    def work(process: int) -> None:
        for entry in range(5):
            enter(DataLedger(path, create=True), f"{process}-{entry}")

    children = [in_child(lambda process=process: work(process)) for process in range(6)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert sorted(names_in(path)) == sorted(f"{process}-{entry}" for process in range(6) for entry in range(5))


def test_processes_that_enter_at_the_same_time_do_not_pass_the_budget_together(ledger, path):
    steps, limit = 100, account(((QUERY, 350),), delta=1e-5).epsilon
    ledger.set_budget(epsilon=limit, delta=1e-5)
    for count in range(1, 6):
        account(((QUERY, count * steps),), delta=1e-5)  # Remembered in the children.

    def work(process: int) -> None:
        try:
            enter(DataLedger(path), str(process), steps=steps)
        except BudgetExceededError:
            os._exit(7)

    children = [in_child(lambda process=process: work(process)) for process in range(6)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(statuses) == [0, 0, 0, 7, 7, 7]
    assert len(names_in(path)) == 3


def test_what_was_entered_survives_a_kill_at_any_time(path):
    told = 0
    for attempt in range(12):
        reader, writer = os.pipe()

        def work(attempt=attempt, writer=writer) -> None:
            for entry in range(1000):
                enter(DataLedger(path, create=True), f"{attempt}-{entry}")
                os.write(writer, b".")

        child = in_child(work)
        told += len(os.read(reader, 1))
        time.sleep(0.003 * attempt)
        kill(child)
        os.close(writer)
        told += len(os.read(reader, 5000))
        os.close(reader)
        assert len(set(names_in(DataLedger(path, create=True).path))) >= told
    assert told > 12


# ---- The file ----


def test_only_its_owner_reads_a_ledger(path):
    previous = os.umask(0)
    try:
        ledger = DataLedger(path, create=True)
        with ledger._store.writing():
            beside = [file for file in path.parent.iterdir() if file != path]
            assert beside and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in beside)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*path.parent.iterdir()] == [path]  # Nothing is left beside it, so that it may be moved alone.
    path.chmod(0o644)
    DataLedger(path, create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def damage_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.rindex(b'"method"')
    data[place + 12] ^= 1
    path.write_bytes(data)


def change(statement: str):
    def run(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()

    return run


@pytest.mark.parametrize(
    "harm",
    [
        damage_page,
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(3000)),
        lambda path: path.write_text("text of another kind, and long enough to be taken for something"),
        change("UPDATE runs SET plan = replace(plan, '100', '001')"),
        change("UPDATE runs SET state = 'withdrawn'"),
        change("UPDATE runs SET name = 'other' WHERE id = 1"),
        change("DELETE FROM runs WHERE id = 1"),
        change("UPDATE budgets SET epsilon = 100"),
        change("DELETE FROM ledger WHERE name = 'key'"),
        change("DROP TABLE runs"),
    ],
)
def test_a_ledger_that_was_damaged_says_so_and_takes_no_entry(ledger, path, harm):
    ledger.set_budget(epsilon=8, delta=1e-5)
    enter(ledger, "a")
    enter(ledger, "b")
    harm(path)
    for use in (lambda: DataLedger(path).read(), lambda: enter(DataLedger(path, create=True), "c")):
        with pytest.raises(DataLedgerError, match=r"it is damaged, or no ledger|it is no ledger, and") as error:
            use()
        one_sentence(error)


def test_digests_that_were_damaged_are_not_taken_for_other_rows(ledger, path):
    enter(ledger, "a")
    change("UPDATE data_sets SET members = zeroblob(24)")(path)
    with pytest.raises(DataLedgerError, match="digests of a data set"):
        Summary.of(ledger)


def test_files_of_others_are_no_ledgers(path):
    change("CREATE TABLE t (a)")(path)
    with pytest.raises(DataLedgerError, match="a file of another program") as error:
        DataLedger(path, create=True).read()
    one_sentence(error)
    path.write_bytes(b"")
    with pytest.raises(DataLedgerError, match="an empty file") as error:
        DataLedger(path).read()
    one_sentence(error)
    enter(DataLedger(path, create=True), "a")  # As after a kill while it was begun.


def test_a_ledger_of_a_newer_version_is_not_guessed_at(ledger, path):
    change("PRAGMA user_version = 2")(path)
    with pytest.raises(DataLedgerError, match="a newer version wrote it") as error:
        ledger.read()
    one_sentence(error)


def test_where_nothing_can_be_written_a_ledger_is_read_and_takes_no_entry(ledger, path, monkeypatch):
    enter(ledger, "a")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert names_in(path) == ["a"]
    with pytest.raises(DataLedgerError, match=r"it can not be written \(it is read-only for this user\)") as error:
        enter(DataLedger(path), "b")
    one_sentence(error)
    path.with_name("data.ledger-wal").write_bytes(b"")
    with pytest.raises(DataLedgerError, match="killed while it wrote") as error:
        DataLedger(path).read()
    one_sentence(error)


def test_a_folder_that_refuses_new_files_says_so(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataLedgerError, match=r"it can not be written \(Permission denied\)") as error:
        DataLedger(tmp_path / "data.ledger", create=True)
    one_sentence(error)


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("fuse.s3fs", True), ("lustre", True), ("ext4", False)],
)
def test_network_paths_are_refused(tmp_path, monkeypatch, kind, is_network):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(place.psutil, "disk_partitions", lambda all: mounts)
    assert find_network(tmp_path / "data.ledger") == (kind if is_network else None)
    if is_network:
        with pytest.raises(DataLedgerError, match=rf"it is on a network \({kind}\)") as error:
            DataLedger(tmp_path / "data.ledger", create=True)
        one_sentence(error)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("data.json", "files that end in .json are published"),
        ("missing/data.ledger", "there is no such folder"),
        ("folder", "it is a folder"),
        ("link", "it is a link"),
        ("out/data.ledger", "it is in output_dir"),
        ("out/deep/data.ledger", "it is in output_dir"),
    ],
)
def test_a_ledger_lies_where_it_is_neither_published_nor_lost(tmp_path, name, reason):
    for folder in ("folder", "out/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataLedgerError, match=reason) as error:
        DataLedger.for_run(tmp_path / name, tmp_path / "out")
    one_sentence(error)


def test_a_missing_ledger_is_not_begun_by_looking_at_it(path):
    with pytest.raises(DataLedgerError, match="there is no such ledger"):
        DataLedger(path)
    assert not path.exists()


def test_a_ledger_that_is_moved_while_it_is_used_is_not_begun_anew(ledger, path):
    enter(ledger, "a")
    shutil.move(path, path.with_name("moved.ledger"))
    for use in (ledger.read, lambda: enter(ledger, "b"), lambda: ledger.note("a", state="ended")):
        with pytest.raises(DataLedgerError, match="it is not there any more"):
            use()
    assert names_in(path.with_name("moved.ledger")) == ["a"] and not path.exists()
