"""Every head: trained, evaluated, predicted with, saved, loaded by transformers or PEFT, and verified."""

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Seq2SeqTrainer,
)

from hf_dpzo import (
    ZOSeq2SeqTrainer,
    ZOSeq2SeqTrainingArguments,
    ZOTrainer,
    ZOTrainingArguments,
    seeded_peft_model,
)
from hf_dpzo.cli.main import main
from hf_dpzo.losses.heads import build_head_loss

from support.heads import BERT, CASES, HeadCase
from support.runs import SHORT_RUN


ADAPTED = ("classes", "answers", "t5", "images")
LABELS = ("labels", "start_positions", "end_positions")
SETTINGS = {**SHORT_RUN, "max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
SETTINGS |= {"smoothing": 1e-2, "clip_norm": 10.0, "logging_strategy": "no"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one step, its base, and what evaluation saw."""

    case: HeadCase
    trainer: ZOTrainer
    folder: str
    base: str
    seen: list


def count_rows(seen):
    def compute(prediction):
        labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
        seen.append(prediction.predictions)
        return {"rows": float(len(labels))}

    return compute


def train(place, name, *, kind=ZOTrainer, arguments=ZOTrainingArguments, adapted=False, loss=None, **changes) -> Run:
    case, seen = CASES[name], []
    base, folder = str(place / "base"), str(place / "out")
    case.model().save_pretrained(base)
    model = type(case.model()).from_pretrained(base).eval()
    own = build_head_loss(model)
    if adapted:
        model = seeded_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), seed=0)
    rows = case.rows(30)
    trainer = kind(
        model=model,
        args=arguments(output_dir=folder, **{**SETTINGS, **changes}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:6]),
        data_collator=case.collator(),
        compute_metrics=count_rows(seen),
        per_example_loss=loss and loss(own),
    )
    trainer.train()
    return Run(case=case, trainer=trainer, folder=folder, base=base, seen=seen)


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("run")
    made = train(place, request.param, adapted=request.param in ADAPTED)
    made.trainer.save_model()
    return made


def test_every_head_is_evaluated_with_metrics(run):
    metrics = run.trainer.evaluate()
    assert metrics["eval_rows"] == 6
    rows = run.case.rows(6)
    expected = run.trainer.per_example_loss(run.trainer.model, run.case.collate(rows)).mean()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_every_head_predicts_with_and_without_labels(run):
    rows = run.case.rows(5)
    predicted = run.trainer.predict(Dataset.from_list(rows))
    first = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    assert len(first) == 5
    assert predicted.metrics["test_rows"] == 5
    unlabelled = [{name: value for name, value in row.items() if name not in LABELS} for row in rows]
    if "MultipleChoice" in run.case.architecture:
        return  # The stock collator of choices needs labels.
    again = run.trainer.predict(Dataset.from_list(unlabelled))
    again_first = again.predictions[0] if isinstance(again.predictions, tuple) else again.predictions
    assert len(again_first) == 5
    assert again.label_ids is None
    assert "test_loss" not in again.metrics


def test_every_head_is_loaded_by_transformers_or_peft(run):
    kind = type(run.case.model())
    if isinstance(run.trainer.model, PeftModel):
        loaded = PeftModel.from_pretrained(kind.from_pretrained(run.base), run.folder)
    else:
        loaded = kind.from_pretrained(run.folder)
    trained = run.trainer.model.state_dict()
    values = {name: value for name, value in loaded.state_dict().items() if name in trained}
    assert values
    assert all(torch.equal(value, trained[name]) for name, value in values.items())
    base = kind.from_pretrained(run.base).state_dict()
    moved = [name for name, value in values.items() if name not in base or not torch.equal(value, base[name])]
    assert moved


def test_every_head_is_verified(run, capsys):
    assert main(["verify", run.folder, "--base", run.base]) == 0, capsys.readouterr().out


# ---- Functions as losses ----


@pytest.mark.parametrize(
    "name", ["classes", "tokens", "answers", "choices", "masked words", "t5", "images", "segments"]
)
def test_a_function_is_trained_on_and_evaluated_for_every_kind_of_head(name, tmp_path):
    run = train(tmp_path, name, loss=lambda own: lambda model, inputs: own(model, inputs).clamp(max=5) / 2)
    assert run.trainer.evaluate()["eval_rows"] == 6
    assert run.seen[-1] is not None


# ---- Public shapes ----


@pytest.mark.parametrize("name", ["tokens", "choices", "t5", "classes by bart"])
def test_rows_of_public_shapes_are_kept_apart_to_the_last_bit(name, tmp_path):
    run = train(tmp_path, name, padded_lengths=[8, 24])
    run.trainer.save_model()
    statement = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert "bitwise" in json.dumps(statement)


# ---- Evaluation is tried before anything is spent ----


@pytest.mark.parametrize("is_public", [False, True])
def test_a_metric_that_fails_is_found_before_anything_is_spent(is_public, tmp_path, monkeypatch):
    def broken(prediction):
        raise KeyError("f1")

    monkeypatch.setitem(train.__globals__, "count_rows", lambda seen: broken)
    with pytest.raises(
        ValueError, match=r"eval_dataset: evaluating public rows raised KeyError: 'f1'; nothing is spent"
    ):
        train(tmp_path, "classes", eval_data_is_public=is_public)
    assert not (tmp_path / "out" / "trajectory.zo").exists()


def test_evaluation_is_tried_on_rows_of_one_length_if_rows_are_made_up(tmp_path):
    """The collator of fixed shapes cannot pad."""
    assert train(tmp_path, "sounds").seen[0].shape[1] == 3


# ---- Generation ----


@dataclass
class JoinedArguments(ZOTrainingArguments, ZOSeq2SeqTrainingArguments.__mro__[2]):
    """The flags of both, joined by a user."""


class JoinedTrainer(ZOTrainer, Seq2SeqTrainer):
    """The two classes, joined by a user."""


@pytest.mark.parametrize(
    ("kind", "arguments"), [(ZOSeq2SeqTrainer, ZOSeq2SeqTrainingArguments), (JoinedTrainer, JoinedArguments)]
)
def test_sequences_are_generated_for_metrics(kind, arguments, tmp_path):
    changes = {"predict_with_generate": True, "generation_max_length": 9}
    run = train(tmp_path, "t5", kind=kind, arguments=arguments, **changes)
    metrics = run.trainer.evaluate(max_length=6, num_beams=2)
    assert metrics["eval_rows"] == 6
    assert run.seen[-1].shape[0] == 6 and run.seen[-1].dtype.kind == "i"
    rows = run.case.rows(6)
    expected = run.trainer.per_example_loss(run.trainer.model, run.case.collate(rows)).mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert run.trainer.predict(run.trainer.eval_dataset, max_new_tokens=3).predictions.dtype.kind == "i"
    run.trainer.save_model()
    assert AutoModelForSeq2SeqLM.from_pretrained(run.folder).config.d_model == 16
    assert main(["verify", run.folder, "--base", run.base]) == 0


def test_a_function_is_the_evaluation_loss_beside_generated_text(tmp_path):
    loss = lambda own: lambda model, inputs: own(model, inputs) * 0 + 3.0 + own(model, inputs) * 1e-3  # noqa: E731
    run = train(
        tmp_path,
        "t5",
        kind=ZOSeq2SeqTrainer,
        arguments=ZOSeq2SeqTrainingArguments,
        loss=loss,
        predict_with_generate=True,
        generation_max_length=5,
    )
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(3.0, abs=0.01)


def test_arguments_without_generation_are_refused_by_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"args=ZOTrainingArguments: .* pass ZOSeq2SeqTrainingArguments"):
        train(tmp_path, "t5", kind=JoinedTrainer)


def test_a_model_that_was_put_together_of_two_is_verified(tmp_path, capsys):
    """Its parts state no type of their weights before it is loaded."""
    part = BertConfig(**{**BERT, "num_labels": 2, "max_position_embeddings": 32})
    torch.manual_seed(0)
    model = EncoderDecoderModel(config=EncoderDecoderConfig.from_encoder_decoder_configs(part, part))
    model.config.update({"decoder_start_token_id": 3, "pad_token_id": 0, "vocab_size": 64})
    model.save_pretrained(tmp_path / "base")
    case = next(one for one in CASES.values() if one.architecture == "T5ForConditionalGeneration")
    trainer = ZOTrainer(
        model=model,
        args=ZOTrainingArguments(output_dir=str(tmp_path / "out"), **SHORT_RUN),
        train_dataset=Dataset.from_list(case.rows(20)),
        data_collator=case.collator(),
    )
    trainer.train()
    trainer.save_model()
    assert main(["verify", str(tmp_path / "out"), "--base", str(tmp_path / "base")]) == 0, capsys.readouterr().out
