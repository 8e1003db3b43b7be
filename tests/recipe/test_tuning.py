"""The numbers that are proposed by public rows move as what they are proposed for."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from hf_dpzo import ZOTrainer
from hf_dpzo.cli.main import main
from hf_dpzo.data.sampling import SealedRows
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.recipe import tuning
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.tuning import Proposal, write_proposals
from hf_dpzo.trainer import tuning as trainer_tuning
from hf_dpzo.trainer.tuning import Tuner

from support.models import one_layer
from support.recipes import refused
from support.rows import labelled_rows
from support.runs import short_args


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(trainer_tuning, "RATE_FACTORS", (0.1, 1.0))
    monkeypatch.setattr(trainer_tuning, "MOST_STEPS", 3)
    monkeypatch.setattr(tuning, "MEASURED_ROWS", 8)


def tuner(folder, *, factor: float = 1.0, **changes) -> Tuner:
    def loss(model, inputs):
        logits = model(**inputs).logits
        return factor * torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    torch.manual_seed(0)
    args = short_args(folder, **{"expected_batch_size": "all", **changes})
    trainer = ZOTrainer(model=one_layer(), args=args, train_dataset=labelled_rows(8), per_example_loss=loss)
    assert trainer.rehearse() is None
    rows = [dict(row) for row in labelled_rows(8)]
    quiet = replace(trainer.method, noise_multiplier=1e-3)
    return Tuner(trainer=trainer, method=quiet, sampling_rate=1.0, planned_steps=12, rows=rows)


@pytest.mark.parametrize("changes", [{"method": "aggzo", "num_directions": 2}, {"method": "dpzo"}])
def test_a_loss_ten_times_as_large_has_ten_times_the_clip_norm_and_a_tenth_of_the_rate(tmp_path, changes):
    plain, large = tuner(tmp_path / "1", **changes), tuner(tmp_path / "10", factor=10.0, **changes)
    smoothing = plain.find_smoothing().smoothing
    assert large.find_smoothing().smoothing == smoothing
    spreads = [one.measure_spread(smoothing) for one in (plain, large)]
    assert spreads[1] / spreads[0] == pytest.approx(10, rel=1e-3)
    rates = [
        min(one.find_rate(smoothing, spread / 2).losses) for one, spread in zip((plain, large), spreads, strict=True)
    ]
    assert rates[0] / rates[1] == pytest.approx(10, rel=0.2)


def test_a_rough_loss_has_a_smaller_smoothing_than_a_smooth_one(tmp_path):
    smooth, rough = tuner(tmp_path / "smooth"), tuner(tmp_path / "rough")
    losses = rough.trainer._estimate.losses
    bent = losses.loss

    def rippled(model, inputs):
        return torch.sin(100 * bent(model, inputs))

    object.__setattr__(losses, "loss", rippled)
    assert rough.find_smoothing().smoothing < smooth.find_smoothing().smoothing


def test_parameters_are_where_they_were_and_a_better_rate_is_proposed(tmp_path):
    found = tuner(tmp_path)
    before = fingerprint_values(found.trainer.model.parameters())
    rate = found.find_rate(1e-2, 1.0)
    assert fingerprint_values(found.trainer.model.parameters()) == before
    assert rate.losses[rate.best] == min(rate.losses.values()) and rate.steps == 3
    assert rate.rate == pytest.approx(rate.best / 2, rel=0.05)  # In twelve steps, noise goes twice as far as in three.


def test_a_loss_that_never_changes_is_refused(tmp_path):
    found = tuner(tmp_path)
    object.__setattr__(found.trainer._estimate.losses, "loss", lambda model, inputs: torch.zeros(len(inputs["labels"])))
    with pytest.raises(ValueError, match=r"^public: the losses of these rows do not change along any direction"):
        found.find_smoothing()


def test_a_recipe_is_written_with_reasons_and_no_private_row_is_fetched(write, workplace, capsys, monkeypatch):
    monkeypatch.setattr(SealedRows, "__getitems__", lambda *_: pytest.fail("a private row was fetched"))
    public, output = workplace / "public.csv", workplace / "tuned.yaml"
    with public.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([f"w{i} w{i % 5}", i % 2] for i in range(12))])
    where = {"where": {"source": "a"}, "eval_rows": "absent"}
    assert main(["tune", write(**where), "--public", str(public), "--output", str(output), "--max_steps", "5"]) == 0
    assert "8 rows of public.csv" in capsys.readouterr().out
    lines = output.read_text().splitlines()
    for name in ("smoothing", "clip_norm", "learning_rate"):
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        assert " # " in line
    recipe, args = read_recipe(output)
    assert args.max_steps == 5 and recipe.where_values == {"source": "a"} and not (workplace / "out").exists()
    assert main(["plan", str(output)]) == 0


def test_rows_are_made_up_without_a_file_and_the_recipe_is_printed(write, capsys):
    assert main(["tune", write(method="mezo", noise_multiplier="absent", target_delta="absent")]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["smoothing"] > 0 and printed["learning_rate"] > 0 and "clip_norm" not in printed
    assert "no such folder" in refused(capsys, "tune", write(), "--output", "nowhere/tuned.yaml")
    path = write()
    before = Path(path).read_text("utf-8")
    assert f"output={path}: the file exists; name a new one" in refused(capsys, "tune", path, "--output", str(path))
    assert Path(path).read_text("utf-8") == before


def test_comments_stay_and_flags_replace_fields(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "# A run.\ndata: rows.csv # Mine.\nmodel_name_or_path: m\nlabel_words: {a: b, c: d}\nclip_norm: 2 # Old.\n"
        "max_steps: 3\n"
    )
    proposals = [Proposal(name="clip_norm", value=0.5, reason="half of 1")]
    flags = ["--max_steps", "9", "--noise_multiplier=1", "--target_delta=1e-3"]
    text = write_proposals(path, flags, proposals)
    assert text.startswith("# A run.\ndata: rows.csv # Mine.\n")
    assert "clip_norm: 0.5 # half of 1\nmax_steps: 9\n" in text and text.endswith("target_delta: 0.001\n")
    path.write_text("{data: rows.csv, model_name_or_path: m, label_words: {a: b, c: 'no'},\n max_steps: 3}")
    flags = ["--without", "max_steps", "--noise_multiplier=1", "--target_delta=1e-3", "--max_steps=1"]
    read = yaml.safe_load(write_proposals(path, flags, proposals))
    assert read["max_steps"] == 1 and read["label_words"] == {"a": "b", "c": "no"} and read["clip_norm"] == 0.5


def test_a_recipe_of_the_library_is_named_by_its_word():
    text = write_proposals("quickstart", [], [Proposal(name="clip_norm", value=0.03, reason="half of 0.06")])
    assert "clip_norm: 0.03 # half of 0.06" in text and "task: feature-classification" in text
