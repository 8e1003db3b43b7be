"""Runs of a head on features: what is computed once, what a step is, and what is saved, resumed and verified."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, LlamaModel, TrainerCallback
from transformers.utils import logging

from hf_dpzo import Trajectory, ZOTrainer, verify
from hf_dpzo.card.repository import read_statement
from hf_dpzo.isolation.watched import changes_in_jumps
from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.models.fingerprints import fingerprint_frozen
from hf_dpzo.trainer import features, objective, progress

from support.models import llama_config, word_tokenizer
from support.rows import few_public_rows, labelled_rows
from support.runs import fingerprint, short_args


TEXTS = [f"w{i} w{i + 1} w{3 * i % 40}" for i in range(12)]
ROWS = 24


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **rest):
        control.should_training_stop = state.global_step >= self._step


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder of a base model."""
    folder = str(tmp_path_factory.mktemp("base"))
    torch.manual_seed(0)
    LlamaModel(llama_config(num_hidden_layers=3)).save_pretrained(folder)
    return folder


def head_on(base: str, **options) -> FeatureClassifier:
    body = LlamaModel.from_pretrained(base)
    return FeatureClassifier.on_base(
        body, word_tokenizer(), **{"id2label": {0: "no", 1: "yes"}, "texts": TEXTS, **options}
    )


def build(base: str, folder, *, rows=None, model=None, per_example_loss=None, **changes) -> ZOTrainer:
    settings = {"method": "aggzo", "num_directions": 4, "smoothing": 0.1, "learning_rate": 1.0, "logging_steps": 100}
    return ZOTrainer(
        model=head_on(base) if model is None else model,
        args=short_args(folder, **{**settings, **changes}),
        train_dataset=labelled_rows(ROWS) if rows is None else rows,
        data_collator=DataCollatorWithPadding(word_tokenizer()),
        probe_rows=few_public_rows(),
        per_example_loss=per_example_loss,
    )


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> ZOTrainer:
    """A finished run with checkpoints, whose batches are all rows. To be read alone."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    trainer = build(base, folder, expected_batch_size=ROWS, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    return trainer


def test_each_row_passes_through_the_base_once_and_only_up_to_the_layer(base, tmp_path):
    model = head_on(base, layer=2)
    calls = {layer: [] for layer in (1, 2)}
    for layer, rows in calls.items():
        model.base.layers[layer].register_forward_hook(lambda m, inputs, output, rows=rows: rows.append(len(inputs[0])))
    trainer = build(base, tmp_path, model=model, max_steps=3)
    filled, fill = [], trainer._fill_table
    trainer._fill_table = lambda model: (filled.append(len(calls[1])), fill(model), filled.append(len(calls[1])))
    trainer.train()
    assert filled[1] - filled[0] == ROWS, "each row alone, and once"
    public = 2 * len(few_public_rows())  # Before and after the first step, to see whether it moved the model.
    assert len(calls[1]) == filled[1] + public, "none in a step"
    assert calls[2] == []


def test_while_features_are_read_the_clock_goes_on_and_only_the_public_number_of_rows_shows(
    base, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "_REFRESHED_EVERY", 0.0)
    build(base, tmp_path, max_steps=1, disable_tqdm=False).train()
    shown = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "Reading features" in line]
    counts = [re.search(r"(\d+)/(\d+) \[", line).groups() for line in shown]
    assert {*counts} == {("0", str(ROWS)), (str(ROWS), str(ROWS))}
    assert counts.count(("0", str(ROWS))) > ROWS // 2, "it is shown again after each micro-batch"


def test_features_are_read_where_transformers_shows_no_bars(base, tmp_path):
    logging.disable_progress_bar()
    try:
        trainer = build(base, tmp_path, max_steps=1, disable_tqdm=False)
        trainer.train()
    finally:
        logging.enable_progress_bar()
    assert len(trainer.budget.ledger) == 1


def test_while_features_of_users_are_read_shares_show_and_no_number_of_rows(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_REFRESHED_EVERY", 0.0)
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 7)
    rows = [{**row, "user": index % 11} for index, row in enumerate(labelled_rows(ROWS))]
    build(base, tmp_path, rows=rows, max_steps=1, disable_tqdm=False, privacy_unit_column="user").train()
    shown = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "Reading features" in line]
    shares = [int(re.fullmatch(r"Reading features: +(\d+)%\|.*\| [\d:]+<[\d:?]+", line)[1]) for line in shown]
    assert shares == sorted(shares) and shares[-1] == 100 and len({*shares}) > 3
    assert all(share % 5 == 0 for share in shares)


def test_features_in_the_table_are_those_of_the_row_alone_to_the_bit(base, finished):
    rows = labelled_rows(ROWS)
    model = head_on(base)
    for index, row in enumerate(rows):
        alone = model.compute_features(torch.tensor([row["input_ids"]]), torch.tensor([row["attention_mask"]]))
        assert torch.equal(finished._table.columns["features"][index], alone[0])
        assert finished._table.columns["labels"][index] == row["labels"]


@pytest.mark.parametrize(("classes", "points", "mirrored"), [(2, 3, False), (2, 2, False), (2, 2, True), (3, 2, True)])
def test_losses_in_one_product_are_those_of_the_points_one_by_one(base, tmp_path, classes, points, mirrored):
    model = head_on(base, id2label={number: str(number) for number in range(classes)})
    trainer = build(base, tmp_path, model=model, max_steps=1)
    trainer.train()
    inputs = {name: column[:5] for name, column in trainer._table.columns.items()}
    named = {name: torch.randn(points, *value.shape) for name, value in trainer.model.classifier.named_parameters()}
    if mirrored:  # As the points of central differences.
        middle = {name: torch.randn(1, *value.shape[1:]) for name, value in named.items()}
        named = {name: torch.cat([middle[name] + v[:1], middle[name] - v[:1]]) for name, v in named.items()}
    together = trainer.per_example_loss.at_points(
        trainer.model, inputs, {f"classifier.{name}": value for name, value in named.items()}
    )
    for point in range(points):
        with torch.no_grad():
            for name, value in trainer.model.classifier.named_parameters():
                value.copy_(named[name][point])
            alone = trainer.per_example_loss(trainer.model, inputs)
        torch.testing.assert_close(together[:, point], alone, rtol=1e-5, atol=1e-6)


def test_all_points_are_evaluated_at_once_and_rows_do_not_move_each_other_in_any_bit(finished):
    assert finished._points_per_pass == 8
    assert finished._environment["isolation"] == {"status": "bitwise", "bound_in_clip_norms": 0.0}


def test_a_batch_of_all_rows_is_not_amplified(finished):
    query = Trajectory.read(finished.args.output_dir).header["plan"]["query"]
    assert query["sampling_rate"] == 1.0
    batch = next(iter(finished._loader))["batch"]
    assert (batch.num_units, len(batch.row_units)) == (ROWS, ROWS)


def test_what_is_saved_is_the_head_and_it_loads_as_a_classifier(finished):
    folder = finished.args.output_dir
    assert (
        os.path.getsize(f"{folder}/model.safetensors") < 4 * sum(p.numel() for p in finished.model.parameters()) + 400
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    row = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert torch.equal(loaded(**row).logits, finished.model(**row).logits)


def test_a_published_head_verifies_and_another_base_does_not(base, finished, tmp_path):
    assert all(found.holds for found in verify(finished.args.output_dir, base=base))
    torch.manual_seed(1)
    LlamaModel(llama_config(num_hidden_layers=3)).save_pretrained(tmp_path)
    found = {finding.name: finding.holds for finding in verify(finished.args.output_dir, base=str(tmp_path))}
    assert found["base model"] is False


def test_the_card_says_what_the_head_reads(finished):
    statement = read_statement(Path(finished.args.output_dir))
    assert statement["reproducibility"]["base_model"]["features"] == {"layer": 2, "position": "last"}
    assert statement["training"]["task"] == "text-classification"
    card = Path(finished.args.output_dir, "README.md").read_text()
    assert "a linear head on features of the frozen base model: the states that leave layer 2, at the last" in card


def test_a_resumed_run_ends_where_its_log_leads(base, finished, tmp_path):
    trainer = build(base, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(StopAt(2))
    trainer.train()
    resumed = build(base, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert len(Trajectory.read(tmp_path).records) == 4
    assert all(found.holds for found in verify(tmp_path, base=base))


def test_a_row_that_fails_counts_as_zero_and_its_neighbours_stay_as_they_are(base, tmp_path, caplog, capfd):
    rows = labelled_rows(ROWS).to_list()
    rows[3]["input_ids"][0] = 73_519  # No token of the base.
    rows[4]["labels"] = 7
    trainer = build(base, tmp_path, rows=Dataset.from_list(rows), expected_batch_size=ROWS, max_steps=1)
    trainer.train()
    assert trainer._table.columns["features"].isnan().all(dim=1).nonzero().flatten().tolist() == [3]
    losses = trainer._estimate.losses(trainer.model, next(iter(trainer._loader))["batch"])
    assert losses.isnan().nonzero().flatten().tolist() == [3, 4]
    shown = caplog.text + "".join(capfd.readouterr())
    assert "73519" not in shown and "IndexError" not in shown


def test_users_are_units_of_rows_in_the_table(base, tmp_path):
    rows = labelled_rows(ROWS).add_column("user", [index // 3 for index in range(ROWS)])
    trainer = build(
        base, tmp_path, rows=rows, privacy_unit_column="user", max_rows_per_unit=2, expected_batch_size=4, max_steps=1
    )
    trainer.train()
    batch = next(iter(trainer._loader))["batch"]
    assert not trainer._table.columns["features"].isnan().any()
    assert np.bincount(batch.row_units, minlength=1).max(initial=0) <= 2


def test_rows_of_public_lengths_are_read_together(base, tmp_path):
    trainer = build(base, tmp_path, padded_lengths=[16], max_steps=1)
    trainer.train()
    alone = head_on(base).compute_features(torch.tensor([labelled_rows(ROWS)[0]["input_ids"]]))
    torch.testing.assert_close(trainer._table.columns["features"][0], alone[0], rtol=1e-4, atol=1e-5)


def test_a_trained_head_does_not_begin_a_run_that_does_not_count_the_other(base, finished, tmp_path):
    trained = FeatureClassifier.from_pretrained(finished.args.output_dir)
    with pytest.raises(ValueError, match="another run has trained it"):
        build(base, tmp_path, model=trained, max_steps=1).train()


def test_the_frozen_fingerprint_covers_the_base(base):
    model = head_on(base)
    before = fingerprint_frozen(model, model.classifier.parameters())
    model.base.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert fingerprint_frozen(model, model.classifier.parameters()) != before


def test_a_losses_own_function_is_evaluated_on_features_too(base, tmp_path):
    def loss(model, inputs):
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    trainer = build(base, tmp_path, per_example_loss=loss, max_steps=1)
    trainer.train()
    assert trainer._points_per_pass is None and fingerprint(trainer)


def errors(model, inputs):
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return (logits.argmax(dim=1) != inputs["labels"]).float()


def test_whether_losses_jump_is_asked_of_features_that_were_read_once(base, tmp_path, monkeypatch):
    asked = []

    def record(model, losses, batches):
        asked.extend(row for rows in batches for row in rows)
        return changes_in_jumps(model, losses, batches)

    monkeypatch.setattr(objective, "changes_in_jumps", record)
    build(base, tmp_path, max_steps=1).train()
    assert asked and all(set(row) == {"features", "labels"} for row in asked)


def test_a_loss_of_a_head_that_changes_in_jumps_is_refused_where_neighbours_choose_the_shape(base, tmp_path):
    trainer = build(base, tmp_path, per_example_loss=errors, points_per_pass=2, max_steps=1)
    with pytest.raises(ValueError, match="this objective changes in jumps"):
        trainer.train()
