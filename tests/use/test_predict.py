"""A loaded model answers as the run evaluated: every kind of task, whatever of the run was kept."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from huggingface_hub import create_repo
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

import hf_dpzo
from hf_dpzo import ZOTrainer, seeded_peft_model, verify
from hf_dpzo.card.files import is_public_file
from hf_dpzo.cli.main import main
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.tables import load_tables

from support.rows import labelled_rows


def said(folder) -> dict[str, float]:
    """Return the metrics that the run itself measured on the rows that it held out."""
    return json.loads((folder / "privacy.json").read_text())["evaluation"]["metrics"]


def load(folder, models, base="causal"):
    return hf_dpzo.load(folder, base=str(models / base), device="cpu")


KINDS = ("words", "activated", "head", "full")


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


def test_rows_may_be_a_data_set_a_data_frame_or_a_file(words, models):
    model = load(words, models)
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(5)]
    expected = model.predict(rows)
    assert model.predict(Dataset.from_list(rows)) == model.predict(pd.DataFrame(rows)) == expected
    assert model.predict(Dataset.from_list(rows)["text"]) == expected
    measured = model.evaluate(rows)
    assert model.evaluate(pd.DataFrame(rows)) == measured
    (words.parent / "few.csv").write_text("text,label\n" + "".join(f"w{i},{i % 2}\n" for i in range(5)))
    assert model.evaluate(words.parent / "few.csv") == measured


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


@pytest.fixture
def published(hub, words, tmp_path):
    """A repository with all public files of a run, and one with its log alone."""
    for name in ("tester/model", "tester/log"):
        create_repo(name)
    for path in words.iterdir():
        if is_public_file(path):
            hub.edit("tester/model", path.name, path.read_bytes())
    assert main(["push-log", str(words), "tester/log"]) == 0
    return "tester/model", "tester/log"


def test_repositories_answer_as_the_folder_does(published, hub, words, models):
    texts = ["w1 w2", "w3"]
    assert "recipe.json" in hub.commits("tester/log")[-1].files
    own, *others = (load(place, models).predict(texts) for place in (words, *published))
    assert all(answers == own for answers in others)


def test_a_run_in_python_gives_its_model_and_says_that_it_has_no_recipe(tmp_path, tokenizer, make_args, models):
    base = AutoModelForSequenceClassification.from_pretrained(models / "classifier")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    args = make_args()
    options = {"args": args, "train_dataset": labelled_rows(40), "processing_class": tokenizer}
    trainer = ZOTrainer(model=seeded_peft_model(base, config, seed=0), **options)
    trainer.train()
    trainer.save_model()
    model = load(args.output_dir, models, "classifier")
    assert model.recipe is None and model.tokenizer("w1")["input_ids"] == tokenizer("w1")["input_ids"]
    with pytest.raises(ValueError, match="keeps none, because Python code or an earlier version trained it"):
        model.predict("w1")
    folder = Path(args.output_dir)
    assert not (folder / "recipe.json").exists() and "## Use it" not in (folder / "README.md").read_text()
    assert "recipe" not in {finding.name for finding in verify(folder, weights=False)}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**FIELDS, "model_name_or_path": str(models / "classifier")}))
    told = hf_dpzo.load(folder, base=str(models / "classifier"), recipe=path, device="cpu")
    assert told.predict("w1")["label"] in ("no", "yes")


FIELDS = {"task": "sequence-classification", "classes": ["no", "yes"], "data": "rows.csv", "method": "mezo"}
FIELDS |= {"max_steps": "1", "output_dir": "out", "where": '{"source": "a"}', "use_cpu": "true"}
