"""A run is in the ledger of its data before its first step, once, whatever becomes of it, and its card says so."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from hf_dpzo import ZOTrainer
from hf_dpzo.card.files import is_public_file
from hf_dpzo.card.schema import check_statement
from hf_dpzo.cli.main import main
from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.entry_mark import MARK_FILE
from hf_dpzo.data_ledger.place import DataLedgerError
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.ledger import BudgetExceededError
from hf_dpzo.privacy.queries import GaussianQuery, NonPrivateQuery
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.verification.verify import verify

from support.ledgers import in_child
from support.models import one_layer, with_lora
from support.rows import labelled_rows
from support.runs import train


STEPS = 4
NO_NOISE = {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "data.ledger"


@pytest.fixture
def run(tmp_path, path):
    def make(name: str = "run", **changes) -> ZOTrainer:
        torch.manual_seed(0)  # A run that goes on begins from the same model.
        return train(tmp_path / name, model=with_lora(one_layer()), **{"privacy_ledger": str(path), **changes})

    return make


@pytest.fixture
def cheap_run(run):
    """Without noise, which leaves accountants out."""
    return functools.partial(run, **NO_NOISE)


def runs(path: Path) -> list:
    return list(DataLedger(path).read().runs)


class Call(TrainerCallback):
    """Calls a function before step number `at`, from 0."""

    def __init__(self, function, at: int = 0) -> None:
        self.function, self.at = function, at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.function()


def fail() -> None:
    raise RuntimeError("the user's own")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- One entry ----


def test_a_run_is_entered_before_its_first_step_and_noted_when_it_ends(run, path):
    seen = []
    run(callbacks=[Call(lambda: seen.extend(runs(path)))])
    (before,), (after,) = seen, runs(path)
    query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.2)
    assert (before.state, before.steps, before.plan.releases) == ("begun", 0, ((query, STEPS),))
    assert (after.state, after.steps, after.plan) == ("ended", STEPS, before.plan)


def test_a_killed_run_that_goes_on_is_the_same_entry(run, path):
    assert os.waitpid(in_child(lambda: run(callbacks=[Call(kill_self, at=2)])), 0)[1] == signal.SIGKILL
    (killed,) = runs(path)
    assert (killed.state, killed.plan.planned_steps) == ("begun", STEPS)
    run(resume=True)
    (ended,) = runs(path)
    assert (ended.name, ended.state, ended.steps) == (killed.name, "ended", STEPS)


def test_a_run_that_fails_before_its_first_step_is_withdrawn_until_it_goes_on(run, path):
    with pytest.raises(RuntimeError, match="the user's own"):
        run(callbacks=[Call(fail)])
    assert [one.state for one in runs(path)] == ["withdrawn"]
    run(resume=True)
    assert [one.state for one in runs(path)] == ["ended"]


def test_a_run_that_fails_later_counts_in_full(run, path):
    with pytest.raises(RuntimeError, match="the user's own"):
        run(callbacks=[Call(fail, at=1)])
    (one,) = runs(path)
    assert (one.state, one.steps, one.counts, one.plan.planned_steps) == ("ended", 1, True, STEPS)


def test_a_log_that_is_deleted_gives_nothing_back(cheap_run, path, tmp_path):
    with pytest.raises(RuntimeError, match="the user's own"):
        cheap_run(callbacks=[Call(lambda: (os.remove(tmp_path / "run" / "trajectory.zo"), fail()), at=2)])
    cheap_run()
    assert [one.counts for one in runs(path)] == [True, True]


def test_a_moved_folder_goes_on_as_the_same_run_and_a_copy_beside_it_as_another_one(cheap_run, path, tmp_path):
    with pytest.raises(RuntimeError):
        cheap_run("first", callbacks=[Call(fail, at=1)])
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    cheap_run("copy", resume=True)
    shutil.move(tmp_path / "first", tmp_path / "moved")
    cheap_run("moved", resume=True)
    entered = [(Path(one.plan.folder).name, one.plan.planned_steps, one.steps) for one in runs(path)]
    assert entered == [("moved", STEPS, STEPS), ("copy", STEPS - 1, STEPS)]


def test_a_folder_that_is_brought_back_from_before_is_another_run(cheap_run, path, tmp_path):
    with pytest.raises(RuntimeError):
        cheap_run(callbacks=[Call(fail, at=1)])
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    cheap_run(resume=True)
    shutil.rmtree(tmp_path / "run")
    shutil.move(tmp_path / "backup", tmp_path / "run")
    cheap_run(resume=True)
    assert [one.plan.planned_steps for one in runs(path)] == [STEPS, STEPS - 1]


def test_replays_and_evaluations_cost_nothing(run, path):
    trainer = run()
    before = DataLedger(path).read().revision
    trainer.evaluate(labelled_rows(8, seed=1))
    trainer.save_model()
    assert main(["ledger", str(path)]) == 0
    assert DataLedger(path).read().revision == before


# ---- The rows ----


def test_the_same_rows_are_recognized_in_any_order_and_a_row_more_is_told(cheap_run, path, capsys):
    rows = labelled_rows(40)
    cheap_run("a", rows=rows)
    cheap_run("b", rows=rows.shuffle(seed=3))
    cheap_run("c", rows=labelled_rows(41))
    assert [one.data_set for one in runs(path)] == [1, 1, 2]
    main(["ledger", str(path)])
    lines = capsys.readouterr().out.splitlines()[-3:]
    for line, words in zip(lines, ("the first", "the same", "partly the same"), strict=True):
        assert f"  {words}  " in line


def test_users_are_the_units_where_a_column_names_them(cheap_run, path):
    rows = labelled_rows(40).add_column("patient", [f"p{i // 2}" for i in range(40)])
    cheap_run(rows=rows, privacy_unit_column="patient")
    (one,) = runs(path)
    assert (one.plan.unit_column, one.plan.num_units) == ("patient", 20)
    assert len(DataLedger(path).read_members()[1].digests) == 20


def test_canaries_count_as_units_and_are_nobodys_rows(run, path):
    run(canaries=4)
    assert runs(path)[0].plan.num_units == 44
    assert len(DataLedger(path).read_members()[1].digests) == 40


# ---- Budgets ----


def test_a_run_beyond_the_budget_is_refused_before_its_first_step(run, path, tmp_path):
    DataLedger(path, create=True).set_budget(epsilon=0.01, delta=1e-4)
    with pytest.raises(BudgetExceededError, match=r"^privacy_ledger=.*no step of it fits"):
        run()
    assert runs(path) == [] and not (tmp_path / "run" / "trajectory.zo").exists()
    DataLedger(path).set_budget(epsilon=100, delta=1e-4)
    run()  # The folder is free, and its lock too.
    assert len(runs(path)) == 1


def test_a_run_without_noise_is_entered_as_what_it_is_and_refused_by_a_budget(run, path):
    run("a", **NO_NOISE)
    assert runs(path)[0].plan.releases == ((NonPrivateQuery(), STEPS),)
    DataLedger(path).set_budget(epsilon=8, delta=1e-4)
    with pytest.raises(BudgetExceededError, match="method=mezo adds no noise"):
        run("b", **NO_NOISE)


def test_earlier_runs_that_are_not_in_the_ledger_are_entered_first(run, path, tmp_path):
    run("first", privacy_ledger=None)
    run("second", earlier_runs=[str(tmp_path / "first")])
    assert [(one.plan.planned_steps, Path(one.plan.folder).name) for one in runs(path)] == [(4, "first"), (4, "second")]
    run("third", earlier_runs=[str(tmp_path / name) for name in ("first", "second")])
    assert [one.plan.planned_steps for one in runs(path)] == [4, 4, 4]
    assert main(["ledger", str(path), "--add", str(tmp_path / "first"), str(tmp_path / "third")]) == 0
    assert len(runs(path)) == 3


# ---- A ledger that goes away ----


def test_a_ledger_that_is_moved_during_a_run_has_it_all_and_is_asked_for_later(cheap_run, path, tmp_path, caplog):
    there = tmp_path / "there.ledger"
    logging.enable_propagation()
    with pytest.raises(RuntimeError):
        cheap_run(callbacks=[Call(lambda: shutil.move(path, there), at=1), Call(fail, at=2)])
    logging.disable_propagation()
    assert "it is not there any more" in caplog.text and not path.exists()
    assert [one.plan.planned_steps for one in runs(there)] == [STEPS]
    with pytest.raises(DataLedgerError, match="this run was entered in one"):
        cheap_run(resume=True)
    cheap_run(resume=True, privacy_ledger=str(there))
    assert [(one.state, one.plan.planned_steps) for one in runs(there)] == [("ended", STEPS)]


def test_a_run_that_another_ledger_holds_counts_in_full_in_this_one(cheap_run, path, tmp_path):
    with pytest.raises(RuntimeError):
        cheap_run(callbacks=[Call(fail, at=1)], privacy_ledger=str(tmp_path / "other.ledger"))
    DataLedger(path, create=True)
    cheap_run(resume=True)
    assert [one.plan.planned_steps for one in runs(path)] == [STEPS]


# ---- The card ----


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    shared = {"privacy_ledger": str(folder / "data.ledger")}
    train(folder / "first", **shared).save_model()
    train(folder / "second", noise_multiplier=2.0, **shared).save_model()
    train(folder / "mezo", **NO_NOISE, **shared).save_model()
    return folder


def test_cards_say_that_their_run_is_one_of_several_and_what_all_come_to(three_runs):
    first, second, mezo = ((three_runs / name / "README.md").read_text() for name in ("first", "second", "mezo"))
    releases = tuple((GaussianQuery(noise_multiplier=noise, sampling_rate=0.2), STEPS) for noise in (1.0, 2.0))
    epsilon = round_up(account(releases, delta=1e-4).epsilon)
    assert "This run is the only one that the ledger of its data counted" in first
    assert "This run is one of 2 that the ledger of its data counted" in second
    assert f"(ε = {epsilon}, δ = 0.0001)-differential privacy.\n\n## Check it" in second
    assert "1 of them added no noise, so that no ε holds for all of them together." in mezo
    said = json.loads((three_runs / "second" / "privacy.json").read_text())
    expected = {"runs": 2, "without_noise": 0, "of_other_units": 0, "epsilon": epsilon, "delta": 1e-4}
    assert said["data_ledger"] == expected


def test_verify_looks_at_the_form_of_what_a_card_says_of_a_ledger(three_runs):
    assert all(finding.holds for finding in verify(three_runs / "second", weights=False))
    said = json.loads((three_runs / "second" / "privacy.json").read_text())
    for wrong in ({"runs": 0}, {"epsilon": -1}, {"digest": "ab"}):
        with pytest.raises(ValueError, match="data_ledger"):
            check_statement({**said, "data_ledger": {**said["data_ledger"], **wrong}})


def test_nothing_of_a_ledger_is_published_but_counts(three_runs):
    ledger = DataLedger(three_runs / "data.ledger")
    entries, members = ledger.read(), ledger.read_members()
    secrets = [entries.key, entries.identity.encode(), *(run.name.encode() for run in entries.runs)]
    secrets += [bytes(digest) for one in members.values() for digest in one.digests.astype("<u8").reshape(-1, 1)]
    secrets += [value.hex().encode() for value in secrets if len(value) == 32]
    public = [file for file in three_runs.glob("*/*") if is_public_file(file)]
    assert len(public) > 10 and not any(file.name == MARK_FILE for file in public)
    for file in public:
        assert not any(secret in file.read_bytes() for secret in secrets), file
    arguments = torch.load(three_runs / "first" / "training_args.bin", weights_only=False)
    assert not any(secret.decode(errors="replace") in str(arguments.to_dict()) for secret in secrets)


def test_a_card_without_a_ledger_does_not_mention_one(run):
    trainer = run(privacy_ledger=None)
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert "ledger" not in (folder / "README.md").read_text()
    assert "data_ledger" not in (folder / "privacy.json").read_text()
