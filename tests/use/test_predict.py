"""A loaded model answers as the run evaluated: every kind of task, whatever of the run was kept."""

import json
import shutil

import pytest

import hf_dpzo
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.tables import load_tables


def said(folder) -> dict[str, float]:
    """Return the metrics that the run itself measured on the rows that it held out."""
    return json.loads((folder / "privacy.json").read_text())["evaluation"]["metrics"]


def load(folder, models, base="causal"):
    return hf_dpzo.load(folder, base=str(models / base), device="cpu")


KINDS = ("words", "head", "full")


@pytest.fixture(params=KINDS)
def kind(request, models):
    folder = request.getfixturevalue(request.param)
    return folder, "classifier" if request.param == "full" else "causal"


def test_answers_are_those_of_the_runs_own_evaluation(kind, models):
    folder, base = kind
    model = load(folder, models, base)
    rows = [{"text": f"w{i % 40} w{i % 7}", "label": i % 2} for i in range(80)]
    answers = model.predict(rows, batch_size=7)
    right = sum(answer["label"] == str(row["label"]) for answer, row in zip(answers, rows, strict=True))
    measured = model.evaluate(rows, batch_size=7)
    assert measured["accuracy"] == pytest.approx(right / 80) and measured["rows"] == 80
    assert all(sum(answer["scores"].values()) == pytest.approx(1) for answer in answers)


def test_an_answer_depends_on_its_row_alone(kind, models):
    model = load(kind[0], models, kind[1])
    texts = ["w1", "w2 w3 w4 w5 w6 w7", "", "w9 w1"]
    together = model.predict(texts)
    assert together[2] is None
    for text, answer in zip(texts, together, strict=True):
        alone = model.predict(text)
        assert alone is None if answer is None else alone["score"] == pytest.approx(answer["score"], abs=1e-5)


def test_the_log_alone_gives_the_same_answers(kind, models, tmp_path):
    folder, base = kind
    for name in ("trajectory.zo", "privacy.json", "README.md", "initial.safetensors"):
        if (folder / name).exists():
            shutil.copy(folder / name, tmp_path)
    texts = ["w1 w2", "w3"]
    whole, log = (load(place, models, base).predict(texts) for place in (folder, tmp_path))
    assert whole == log


def test_the_metrics_of_the_held_out_rows_are_those_of_the_card(kind, models):
    folder, base = kind
    recipe, _ = read_recipe(folder.parent / "recipe.yaml")
    measured = load(folder, models, base).evaluate(load_tables(recipe)[1])
    assert measured["loss"] == pytest.approx(said(folder)["eval_loss"], rel=1e-4)
    assert measured["accuracy"] == pytest.approx(said(folder)["eval_accuracy"])
