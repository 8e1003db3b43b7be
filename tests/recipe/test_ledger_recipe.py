"""Recipes ask the ledger of their data before a model is loaded, and their rows are known whatever model reads them."""

import re
import shutil
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
    assert said.startswith(f"privacy_ledger={path}: this run would come to epsilon=")


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


def test_a_plan_says_what_all_runs_would_come_to_and_enters_nothing(write, workplace, path, capsys):
    recipe = write(privacy_ledger=str(path), eval_rows="absent")
    planned = ["plan", recipe, "--output_dir", str(workplace / "second")]
    assert main(planned) == 0
    assert "runs on these data, with this one" not in table(capsys.readouterr().out) and not path.exists()
    assert main(["train", recipe]) == 0
    capsys.readouterr()
    assert main(planned) == 0
    said = table(capsys.readouterr().out)
    assert said["runs on these data, with this one"] == "2"
    assert len(DataLedger(path).read().runs) == 1
    assert main(["train", recipe, "--output_dir", str(workplace / "second")]) == 0
    assert table(capsys.readouterr().out)["epsilon of all of them"] == said["epsilon of all of them"]


def test_a_plan_beyond_the_budget_says_so(write, path, capsys):
    DataLedger(path, create=True).set_budget(epsilon=0.01, delta=1e-3)
    assert "would come to epsilon=" in refused(capsys, "plan", write(privacy_ledger=str(path)))


def budgeted(path: Path) -> None:
    DataLedger(path, create=True).set_budget(epsilon=0.01, delta=1e-3)


def test_a_relative_ledger_is_the_one_beside_the_recipe_from_any_folder(write, workplace, capsys, monkeypatch):
    recipe = write(privacy_ledger="rows.ledger", data="rows.csv")
    budgeted(workplace / "rows.ledger")
    (workplace / "elsewhere").mkdir()
    for folder, name in ((workplace, "recipe.yaml"), (workplace / "elsewhere", "../recipe.yaml"), (workplace, recipe)):
        monkeypatch.chdir(folder)
        assert "beyond their budget of 0.01" in refused(capsys, "train", name)
    monkeypatch.chdir(workplace / "elsewhere")
    assert not Path("rows.ledger").exists()
    # A flag is typed in the current folder, and means that one.
    assert main(["train", recipe, "--privacy_ledger", "own.ledger"]) == 0
    assert Path("own.ledger").exists()


def test_a_ledger_in_the_current_folder_alone_is_not_passed_over(write, workplace, capsys, monkeypatch):
    write(privacy_ledger="rows.ledger")
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    budgeted(Path("rows.ledger"))
    said = refused(capsys, "train", "../recipe.yaml")
    assert "it means the one beside the recipe" in said and f"write {workplace}/elsewhere/rows.ledger" in said
    for flags in (["--privacy_ledger="], ["--without", "privacy_ledger"]):
        assert main(["train", "../recipe.yaml", *flags]) == 0
        shutil.rmtree(workplace / "out")


def test_no_ledger_begins_or_grows_without_a_word(write, path, capsys, caplog):
    recipe = write(privacy_ledger=str(path))
    new = f"privacy_ledger={path}: new, without a budget; hf-dpzo ledger {path} --budget sets one"
    assert main(["plan", recipe]) == 0
    assert new in table(capsys.readouterr().out)["ledger"] and not path.exists()
    assert [said for said in caplog.messages if "privacy_ledger=" in said] == [new]
    assert main(["train", recipe]) == 0
    DataLedger(path).set_budget(epsilon=500, delta=1e-3)
    assert main(["train", recipe, "--output_dir", f"{path}-second"]) == 0
    first, second = [said for said in caplog.messages if "privacy_ledger=" in said]
    assert first == new  # Once, though the plan, the recipe and the trainer all come across it.
    assert second.startswith(f"privacy_ledger={path}: 1 run, epsilon ") and second.endswith("of 500 at delta 0.001")


# What the refusal of a run names, and what follows from doing as it says.
PLANS = {
    "target_epsilon": {"noise_multiplier": "absent", "target_epsilon": 2, "max_steps": 40},
    "target_epsilon=": {"noise_multiplier": "absent", "target_epsilon": 3, "trials": 2, "report_failed_rows": 0.1},
    "max_steps": {"noise_multiplier": 9, "max_steps": 64},
}


@pytest.mark.parametrize("name", PLANS)
def test_a_refused_run_that_does_as_it_is_told_is_within_the_budget(write, path, capsys, monkeypatch, name):
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("it is loaded"))
    recipe = write(privacy_ledger=str(path), **PLANS[name], eval_rows="absent", expected_batch_size="all")
    DataLedger(path, create=True).set_budget(epsilon=1.3, delta=1e-4)
    said = refused(capsys, "train", recipe)
    name = name.strip("=")
    other = {"target_epsilon": "max_steps", "max_steps": "target_epsilon"}[name]
    assert f"set {name}=" in said and other not in said
    fitting = float(re.search(rf"set {name}=([\d.]+)", said)[1])
    with pytest.raises(pytest.fail.Exception, match="it is loaded"):  # It got past the ledger.
        main(["train", recipe, f"--{name}={fitting:g}"])
    # It is the largest that fits, to a hundredth or to a sixteenth of the steps.
    more = fitting * 1.01 if name == "target_epsilon" else fitting + 4
    assert f"set {name}=" in refused(capsys, "train", recipe, f"--{name}={more:g}")
