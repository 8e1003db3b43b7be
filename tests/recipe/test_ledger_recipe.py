"""Recipes ask the ledger of their data before a model is loaded, and their rows are known whatever model reads them."""

from pathlib import Path

import pytest

from hf_dpzo.cli.main import main
from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.recipe import run

from support.recipes import refused, table


@pytest.fixture
def path(workplace) -> Path:
    return workplace / "rows.ledger"


def test_other_models_and_templates_are_runs_on_the_same_rows(write, workplace, path, capsys):
    assert main(["train", write(privacy_ledger=str(path), eval_rows="absent")]) == 0
    capsys.readouterr()
    changes = {"model_name_or_path": str(workplace / "masked"), "template": "it is {mask} : {text}"}
    changes["lora_target_modules"] = ["query", "value"]
    second = {"output_dir": str(workplace / "second"), "eval_rows": "absent", "max_length": 8}
    assert main(["train", write(privacy_ledger=str(path), **changes, **second)]) == 0
    printed = table(capsys.readouterr().out)
    assert printed["runs on these data"] == "2" and float(printed["epsilon of all of them"]) > float(printed["epsilon"])
    assert [one.data_set for one in DataLedger(path).read().runs] == [1, 1]
    names = [one.plan.base_model for one in DataLedger(path).read().runs]
    assert names == [str(workplace / "causal"), str(workplace / "masked")]


def test_a_run_beyond_the_budget_loads_no_model(write, path, capsys, monkeypatch):
    DataLedger(path, create=True).set_budget(epsilon=0.01, delta=1e-3)
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("it is loaded"))
    said = refused(capsys, "train", write(privacy_ledger=str(path)))
    assert said.startswith(f"privacy_ledger={path}: with this run, the 1 on these data would come to epsilon=")


@pytest.mark.parametrize(
    ("ledger", "reason"),
    [("out/rows.ledger", "it is in output_dir"), ("rows.json", "are published"), ("missing/rows", "no such folder")],
)
def test_a_ledger_in_a_wrong_place_is_refused_before_a_model_is_loaded(
    write, workplace, capsys, monkeypatch, ledger, reason
):
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("it is loaded"))
    (workplace / "out").mkdir()
    assert reason in refused(capsys, "train", write(privacy_ledger=str(workplace / ledger)))


def test_a_flag_without_a_value_leaves_the_ledger_out(write, path):
    assert main(["train", write(privacy_ledger=str(path)), "--privacy_ledger="]) == 0
    assert not path.exists()


def test_an_audit_of_a_run_enters_nothing(write, workplace, path, capsys):
    assert main(["train", write(privacy_ledger=str(path), canaries=8)]) == 0
    before = DataLedger(path).read()
    path.rename(workplace / "away.ledger")
    assert main(["audit", "--run", str(workplace / "out")]) == 0
    assert not path.exists()
    assert DataLedger(workplace / "away.ledger").read() == before
