"""Recipes and the command line, as a user types them."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dpzo.auditing.audit import audit
from hf_dpzo.cli.main import main
from hf_dpzo.models.location import resolve_path
from hf_dpzo.privacy.noise import DiscreteGaussian
from hf_dpzo.recipe.recipe import Recipe, read_recipe

from support.paths import ROOT
from support.recipes import refused, table


def test_train_prints_what_was_reached_and_spent(write, workplace, capsys):
    assert main(["train", write(noise_multiplier="absent", target_epsilon=2)]) == 0
    printed = table(capsys.readouterr().out)
    assert {"accuracy before", "accuracy after", "epsilon", "delta", "steps", "adapter"} <= set(printed)
    assert float(printed["epsilon"]) <= 2
    assert (printed["delta"], printed["steps"]) == ("0.001", "2")
    assert (Path(printed["adapter"]) / "adapter_model.safetensors").is_file()
    said = json.loads((workplace / "out" / "privacy.json").read_text())
    assert said["claim"]["epsilon"] == pytest.approx(float(printed["epsilon"]), abs=1e-3)
    assert said["reproducibility"]["base_model"]["name"] == str(workplace / "causal")


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "causal-lm", "label_words": "absent"},
        {"task": "causal-lm", "label_words": "absent", "template": "{text} :", "response": "{source}"},
        {"label_words": {0: "very bad", 1: "good"}},
        {"adapter": "none"},
        {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"},
        {"method": "aggzo", "num_directions": 2, "directions": "sphere"},
        {"method": "dpzo", "noise": "laplace", "difference": "forward"},
        {"method": "dpzero", "paper_noise": True, "update": "adam", "adam_beta1": 0.5},
        {"method": "zopo", "num_stages": 1, "mask": "dynamic", "pruning_ratio": "1e-1"},
        {"method": "projected", "radius": "1e-2", "num_directions": 2, "update": "normalized"},
        {"method": "projected", "radius": 1, "noise_multiplier": 0, "target_delta": "absent"},
        {"where": {"source": "a"}},
    ],
    ids=str,
)
def test_recipes_of_every_kind_run(write, capsys, changes):
    assert main(["train", write(**changes)]) == 0
    printed = table(capsys.readouterr().out)
    assert ("privacy" in printed) == (changes.get("target_delta") == "absent")
    assert ("pure epsilon" in printed) == ("laplace" in changes.values())


def test_classification_heads_run(write, workplace, capsys):
    changes = {
        "model_name_or_path": str(workplace / "classifier"),
        "task": "sequence-classification",
        "template": "{text}",
    }
    assert main(["train", write(**changes)]) == 0


def test_masked_language_models_run(write, workplace, capsys):
    changes = {"model_name_or_path": str(workplace / "masked"), "template": "{text} very {mask} :"}
    assert main(["train", write(**changes, lora_target_modules=["query", "value"])]) == 0


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_other_files_are_read(write, workplace, kind, capsys):
    import datasets

    rows = datasets.Dataset.from_csv(str(workplace / "rows.csv"))
    path = str(workplace / f"rows.{kind}")
    rows.to_parquet(path) if kind == "parquet" else rows.to_json(path)
    assert main(["train", write(data=path)]) == 0


def test_evaluation_file_is_used(write, workplace, capsys):
    other = workplace / "other.csv"
    other.write_text((workplace / "rows.csv").read_text())
    assert main(["train", write(eval_rows="absent", eval_data=str(other))]) == 0


def test_flags_replace_what_the_recipe_says(write):
    _, args = read_recipe(write(), ["--max_steps", "7", "--directions=gaussian"])
    assert (args.max_steps, args.directions) == (7, "gaussian")


def test_values_are_read_as_what_they_are(write):
    recipe, args = read_recipe(write(target_delta="1e-6", eval_data_is_public=True, weight_decay=0))
    assert args.target_delta == 1e-6
    assert args.eval_data_is_public is True
    assert recipe.lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.labels == ("0", "1")
    assert recipe.words == ("bad", "good")


REFUSED = [
    ({"packing": True}, "packing: a packed row holds several examples, and one row is what is protected; leave it out"),
    ({"max_seq_length": 64}, "max_seq_length: a recipe cuts rows by max_length"),
    ({"assistant_only_loss": True}, "assistant_only_loss: a recipe learns the assistant's turns alone by task=chat"),
    ({"lerning_rate": 1}, "lerning_rate: there is no such field; did you mean learning_rate?"),
    ({"max_steps": "many"}, "max_steps='many': it is no whole number; write it in digits, like 160."),
    ({"lora_layers": "26,27"}, "lora_layers='26,27': it is no whole number; where a flag takes several"),
    ({"target_delta": "10**-5"}, "target_delta='10**-5': it is no number; write it like 2.5 or 1e-5."),
    ({"noise_multiplier": "2,5"}, "noise_multiplier='2,5': it is no number; write it like 2.5 or 1e-5."),
    ({"target_epsilon": -1}, "target_epsilon=-1: it must be positive"),
    ({"noise_multiplier": "absent"}, "give one of the two"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
    ({"method": "sgd"}, "invalid choice: 'sgd'"),
    ({"adapter": "dora"}, "invalid choice: 'dora'"),
    ({"model_name_or_path": "absent"}, "--model_name_or_path"),
    ({"data": "absent"}, "data: missing"),
    ({"data": "/nowhere/rows.csv"}, "data=/nowhere/rows.csv: no such file"),
    ({"template": "{words} :"}, "the data have no column words, only text, label, source"),
    ({"label_column": "class"}, "the data have no column class"),
    ({"where": {"origin": "a"}}, "the data have no column origin"),
    ({"label_words": {0: "bad", 2: "good"}}, "a row has another label"),
    ({"label_words": {0: "bad"}}, "needs two classes or more"),
    ({"label_words": "bad,good"}, "it must be a mapping"),
    ({"classes": {0: "bad", 1: "good"}}, "classes={0, 1}: it is a list, and no mapping; write [0, 1]."),
    ({"padded_lengths": {16: 1}}, "padded_lengths={16}: it is a list, and no mapping; write [16]."),
    ({"label_words": [" no", " yes"]}, "label_words=[ no, yes]: it is no list, but a mapping; write {class: word}."),
    ({"where": ["a", "b"]}, "where=[a, b]: it is no list, but a mapping; write {column: value}."),
    (
        {"perturbation_scales": ["a", "b"]},
        "perturbation_scales=[a, b]: it is no list, but a mapping; write {part of a name: scale}.",
    ),
    ({"template": ["a", "b"]}, "template=[a, b]: it is no list, but one value."),
    ({"max_steps": [1, 2]}, "max_steps=[1, 2]: it is no list, but one value."),
    ({"eval_rows": 80}, "eval_rows=80: it leaves no row on one side"),
    ({"eval_split": "test"}, "split=test: a file has no splits"),
    ({"expected_batch_size": 71}, "expected_batch_size=71: the training data have 70 rows"),
    ({"target_delta": "0.1"}, "target_delta=0.1: with 70 rows"),
    ({"model_name_or_path": "package://no_such_package"}, "the Python package no_such_package is not installed"),
    ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hub_strategy=checkpoint"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_bad_recipes_get_one_sentence(write, capsys, changes, message):
    assert message in refused(capsys, "train", write(**changes))


def test_training_file_is_not_for_evaluation(write, workplace, capsys):
    assert "it is the training data" in refused(capsys, "train", write(eval_data=str(workplace / "rows.csv")))


def test_a_word_too_many_gets_one_sentence(write, capsys):
    said = refused(capsys, "train", write(), "--label_words", "no", "yes")
    assert "yes: no flag takes it; one that is no list takes one value" in said


def test_bad_files_get_one_sentence(workplace, capsys):
    for command in ("train", "plan", "tune", "audit"):
        assert "there is no such file" in refused(capsys, command, str(workplace / "none.yaml"))
    (workplace / "list.yaml").write_text("- a\n- b\n")
    assert "it must be a mapping" in refused(capsys, "train", str(workplace / "list.yaml"))
    (workplace / "broken.yaml").write_text("a: [1\n")
    assert "it is not valid YAML" in refused(capsys, "train", str(workplace / "broken.yaml"))
    assert "recipe: missing" in refused(capsys, "train")


def test_unknown_flags_get_one_sentence(write, capsys):
    assert "max_step: there is no such field; did you mean max_steps?" in refused(
        capsys, "train", write(), "--max_step=3"
    )


PLAN = ["--target_delta", "1e-5", "--num_rows", "4000", "--expected_batch_size", "64", "--max_steps", "1000"]


def test_epsilon_answers_without_a_model(capsys):
    assert main(["epsilon", "--noise_multiplier", "1.26344", *PLAN]) == 0
    assert float(table(capsys.readouterr().out)["epsilon"]) == pytest.approx(2.0, abs=0.005)


def test_calibrate_is_the_inverse_of_epsilon(capsys):
    assert main(["calibrate", "--target_epsilon", "2", *PLAN]) == 0
    printed = table(capsys.readouterr().out)
    assert float(printed["noise multiplier"]) == pytest.approx(1.2634, abs=0.002)
    assert float(printed["epsilon"]) <= 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--noise_multiplier", "0"], "noise_multiplier=0"),
        (["--noise_multiplier", "1", "--target_delta", "0"], "target_delta=0.0"),
        (["--noise_multiplier", "1", "--expected_batch_size", "5000"], "expected_batch_size=5000"),
        (["--noise_multiplier", "1", "--max_steps", "0"], "max_steps=0"),
        (["--noise_multiplier", "1", "--steps", "3"], "--steps: there is no such option"),
    ],
)
def test_impossible_plans_get_one_sentence(capsys, changed, message):
    assert message in refused(capsys, "epsilon", *PLAN, *changed)


def test_python_m_runs_the_same_command():
    command = [sys.executable, "-m", "hf_dpzo", "epsilon", "--noise_multiplier", "2", *PLAN]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "noise multiplier" in result.stdout


def test_help_lists_every_field(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--target_epsilon" in text and "--label_words" in text and "--learning_rate" in text


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    recipe, args = read_recipe(path)
    assert isinstance(recipe, Recipe)
    assert args.target_epsilon is None or args.target_epsilon <= 4


def test_package_paths_are_resolved_without_importing():
    assert Path(resolve_path("package://hf_dpzo/templates/model_card.md")).is_file()
    assert resolve_path("org/name") == "org/name"


def test_a_flag_can_leave_fields_of_a_recipe_out(write):
    path = write()
    _, args = read_recipe(path, ["--method", "mezo", "--without", "noise_multiplier,target_delta"])
    assert not args.private
    with pytest.raises(ValueError, match=r"without=depth: the recipe has no such field; it has .*method"):
        read_recipe(path, ["--without=depth"])


def test_plans_that_training_would_refuse_are_refused(capsys):
    plan = ["--num_rows", "5000", "--expected_batch_size", "64", "--max_steps", "100"]
    assert main(["calibrate", "--target_epsilon", "2", "--target_delta", "0.5", *plan]) == 2
    assert "target_delta=0.5: with 5000 rows" in capsys.readouterr().err
    assert main(["epsilon", "--noise_multiplier", "0.01", "--target_delta", "1e-6", *plan]) == 2
    assert "more than 1000 promises nothing" in capsys.readouterr().err


def test_laplace_plans_state_both_epsilons(capsys):
    plan = ["--num_rows", "5000", "--expected_batch_size", "64", "--max_steps", "100", "--target_delta", "1e-6"]
    assert main(["calibrate", "--noise", "laplace", "--target_epsilon", "2", *plan]) == 0
    printed = table(capsys.readouterr().out)
    assert printed["pure epsilon"] == "2 (delta 0)"
    assert float(printed["epsilon"]) < 2


def test_epsilon_of_several_rows_of_a_person_is_stated_on_request(capsys):
    plan = ["--target_delta", "1e-5", "--num_rows", "5000", "--expected_batch_size", "64", "--max_steps", "100"]
    assert main(["epsilon", "--noise_multiplier", "1.2", *plan, "--rows_per_person", "3"]) == 0
    said = table(capsys.readouterr().out)
    assert float(said["epsilon of 3 rows of a person"]) > 2 * float(said["epsilon"])
    assert "rows_per_person=0" in refused(
        capsys, "epsilon", "--noise_multiplier", "1.2", *plan, "--rows_per_person", "0"
    )


def test_rows_that_would_all_be_too_long_are_refused(write, capsys):
    said = refused(capsys, "train", write(), "--padded_lengths", "16", "--max_length", "32")
    assert "padded_lengths=[16]: rows may have max_length=32 tokens" in said


def test_audits_print_a_table(write, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_dpzo.auditing.audit.audit", functools.partial(audit, releases=200))
    assert main(["audit", write(), "--picture", str(tmp_path / "roc.png")]) == 0
    out = capsys.readouterr().out
    assert "noise scale" in out and "VIOLATED" not in out
    assert (tmp_path / "roc.png").stat().st_size > 1000


def test_audits_of_what_leaks_end_with_1(write, capsys, monkeypatch):
    monkeypatch.setattr(DiscreteGaussian, "add", lambda noise, values: values)
    monkeypatch.setattr("hf_dpzo.auditing.audit.audit", functools.partial(audit, releases=200))
    assert main(["audit", write()]) == 1
    assert "VIOLATED" in capsys.readouterr().out


def test_bad_audits_get_one_sentence(write, capsys, tmp_path):
    assert "recipe: missing" in refused(capsys, "audit")
    assert "it adds no noise" in refused(
        capsys, "audit", write(), "--method", "mezo", "--without", "noise_multiplier,target_delta"
    )
    assert "there is no such folder" in refused(capsys, "audit", write(), "--picture", "/nowhere/roc.png")
    assert "it is none of" in refused(capsys, "audit", write(), "--picture", str(tmp_path / "roc.txt"))


def test_users_of_a_recipe_are_protected(write, workplace, capsys):
    assert (
        main(["train", write(privacy_unit_column="source", eval_rows=1, expected_batch_size=1, target_delta="0.1")])
        == 0
    )
    assert "all rows of one user (column source)" in (workplace / "out" / "privacy.json").read_text()
