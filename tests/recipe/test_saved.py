"""The recipe beside the weights: in the log, in a file, in the card, and found by `verify` where it was changed."""

import json
import shutil
from pathlib import Path

import pytest

from hf_dpzo.cli.main import main
from hf_dpzo.recipe.recipe import parse_recipe
from hf_dpzo.recipe.saved import describe_use, restore_recipe
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.verification.verify import verify

from support.data_recipes import letter_tokenizer


TEMPLATE = "<b>`x`\n{text} :"


@pytest.fixture(scope="module")
def run(models, tmp_path_factory) -> Path:
    """The folder of a run of a recipe with a template that could end a block of code. To be read alone."""
    folder = tmp_path_factory.mktemp("run")
    fields = {
        "model_name_or_path": str(models / "causal"),
        "data": str(models / "rows.csv"),
        "template": TEMPLATE,
        "label_words": '{"0": "bad", "1": "good"}',
        "lora_target_modules": "q_proj",
        "method": "dpzero",
        "noise_multiplier": "1",
        "target_delta": "1e-3",
        "expected_batch_size": "8",
        "max_steps": "1",
        "smoothing": "1e-2",
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(fields))
    assert main(["train", str(path)]) == 0
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run / "out", tmp_path / "copy"))


def findings(folder: Path, **options) -> dict[str, bool | None]:
    return {finding.name: finding.holds for finding in verify(folder, weights=False, **options)}


def test_the_recipe_is_saved_without_a_path_of_this_machine_or_what_is_not_needed(run):
    text = (run / "out/recipe.json").read_text()
    saved = json.loads(text)
    assert saved["model_name_or_path"] == "causal"
    assert (saved["task"], saved["template"]) == ("prompt-classification", TEMPLATE)
    assert (saved["classes"], saved["label_words"]) == (["0", "1"], ["bad", "good"])
    assert str(run) not in text and "rows.csv" not in text


def test_the_log_and_the_statement_hold_the_same_recipe(run):
    header = Trajectory.read(run / "out").header
    assert header["recipe"] == json.loads((run / "out/privacy.json").read_text())["training"]["recipe"]
    assert findings(run / "out")["recipe"] is True


@pytest.mark.parametrize(
    ("name", "value"), [("template", "{text}"), ("classes", ["1", "0"]), ("max_length", 3), ("task", "chat")]
)
def test_verify_names_a_changed_recipe(copied, name, value):
    saved = json.loads((copied / "recipe.json").read_text())
    (copied / "recipe.json").write_text(json.dumps({**saved, name: value}))
    failed = [finding for finding in verify(copied, weights=False) if finding.holds is False]
    assert [finding.name for finding in failed] == ["recipe"] and name in failed[0].detail


def test_verify_names_a_recipe_that_is_missing_and_one_in_the_statement_alone(copied):
    statement = json.loads((copied / "privacy.json").read_text())
    (copied / "recipe.json").unlink()
    assert findings(copied)["recipe"] is False
    statement["training"]["recipe"]["template"] = "{text}"
    (copied / "privacy.json").write_text(json.dumps(statement))
    assert findings(copied)["description"] is False


def test_hf_dpzo_card_writes_the_recipe_anew(copied):
    before = (copied / "recipe.json").read_text()
    (copied / "recipe.json").unlink()
    assert main(["card", str(copied)]) == 0
    assert (copied / "recipe.json").read_text() == before


def test_the_card_shows_the_recipe_and_no_markup_of_it(run):
    use = (run / "out/README.md").read_text().partition("## Use it")[2].partition("\n## ")[0]
    assert "<b>" not in use and "`x`" not in use
    shown = use.partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(shown) == Trajectory.read(run / "out").header["recipe"]


def test_a_resumed_run_must_use_the_recipe_that_it_began_with(run, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    fields = json.loads((run / "recipe.yaml").read_text())
    path.write_text(json.dumps({**fields, "template": "{text} ."}))
    assert main(["train", str(path), "--resume_from_checkpoint", "true"]) == 2
    assert "recipe.template=" in capsys.readouterr().err
    assert main(["train", str(run / "recipe.yaml"), "--resume_from_checkpoint", "true"]) == 0


COMMON = {"data": "rows.csv", "model_name_or_path": "m", "method": "mezo", "max_steps": "1", "output_dir": "out"}


@pytest.mark.parametrize(
    "fields",
    [
        {"label_words": '{"b": "x", "a": "y"}', "template": "{title}: {text}"},
        {"task": "sequence-classification", "classes": ["no", "yes"]},
        {"task": "feature-classification", "classes": ["007", "1e3"], "layer": "2", "position": "mean"},
        {"task": "several-labels", "classes": ["x", "y"], "label_separator": ";"},
        {"task": "regression", "label_columns": ["a", "b"]},
        {"task": "token-classification", "classes": ["O", "B"], "columns": '{"tokens": "words"}'},
        {"task": "multiple-choice", "classes": ["A", "B"], "columns": '{"choices": ["one", "two"]}'},
        {"task": "question-answering"},
        {"task": "masked-lm"},
        {"task": "causal-lm", "response": " {answer}"},
        {"task": "chat", "columns": '{"messages": "talk"}'},
        {"task": "seq2seq-lm", "response": "{answer}"},
        {"task": "generation", "response": "{a}", "reward": "exact_match", "stop_strings": ["\n"]},
    ],
    ids=lambda fields: fields.get("task", "prompt-classification"),
)
def test_a_restored_recipe_is_the_one_that_was_described(fields):
    recipe, _ = parse_recipe({**COMMON, **fields})
    used = json.loads(json.dumps(describe_use(recipe, letter_tokenizer()), sort_keys=True))
    restored = restore_recipe(used, "m")
    assert describe_use(restored, letter_tokenizer()) == describe_use(recipe, letter_tokenizer())
    assert restored.labels == recipe.labels and restored.words == recipe.words


@pytest.mark.parametrize("template", ["{text:>99999999999}", "{text} {title:^100000}", "{text"])
def test_a_template_that_no_run_saves_is_refused(template):
    with pytest.raises(ValueError, match="template"):
        restore_recipe({"task": "causal-lm", "max_length": 8, "template": template}, "m")
