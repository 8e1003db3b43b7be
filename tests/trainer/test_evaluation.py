"""Evaluation by losses of one row each; what is saved beside a model; adapters that do nothing."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerFast, default_data_collator

from hf_dpzo import ZOTrainer
from hf_dpzo.data.padding import PaddingCollator

from support.models import causal_lm, classifier, one_layer, with_lora
from support.rows import few_public_rows, labelled_rows


@pytest.fixture
def build(make_args, tokenizer):
    def trainer(model=None, **changes):
        return ZOTrainer(
            **{
                "model": model or one_layer(),
                "args": make_args(**changes.pop("args", {})),
                "train_dataset": labelled_rows(40),
                "eval_dataset": labelled_rows(6, seed=1),
                "data_collator": DataCollatorWithPadding(tokenizer),
                "probe_rows": few_public_rows(),
                **changes,
            }
        )

    return trainer


def count_calls(model):
    calls = []
    model.register_forward_hook(lambda *call: calls.append(1))
    return calls


@pytest.mark.parametrize("metrics", [None, lambda prediction: {"shape": float(prediction.predictions.shape[1])}])
def test_a_function_is_evaluated_once(build, metrics):
    model = one_layer()

    def loss(model, inputs):
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]

    trainer = build(model, per_example_loss=loss, compute_metrics=metrics)
    calls = count_calls(model)
    found = trainer.evaluate()
    assert len(calls) == 1
    assert ("eval_shape" in found) == (metrics is not None)


def test_a_function_that_needs_no_labels_is_evaluated_without_any(build):
    def loss(model, inputs):
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]

    unlabelled = labelled_rows(6).remove_columns("labels")
    assert "eval_loss" in build(per_example_loss=loss).evaluate(unlabelled)
    assert "eval_loss" not in build().evaluate(unlabelled)


def test_a_function_that_misses_labels_predicts_all_the_same(build):
    def loss(model, inputs):
        return model(input_ids=inputs["input_ids"]).logits[:, 0] * inputs["labels"]

    predicted = build(per_example_loss=loss).predict(labelled_rows(6).remove_columns("labels"))
    assert predicted.predictions.shape == (6, 2)
    assert predicted.label_ids is None


class Plain(torch.nn.Module):
    """A module that returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 2)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids).mean(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize(
    "loss",
    [None, lambda model, inputs: (model(inputs["input_ids"])["logits"].argmax(-1) != inputs["labels"]).float() * 0.5],
)
def test_a_plain_module_that_returns_a_dictionary_is_evaluated(build, loss):
    rows = Dataset.from_list([{"input_ids": [5 + i, 6, 7], "labels": i % 2} for i in range(20)])
    trainer = build(
        Plain(),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        probe_rows=rows.to_list()[:4],
        data_collator=None,
        per_example_loss=loss,
        compute_metrics=lambda prediction: {"shape": float(prediction.predictions.shape[1])},
    )
    assert trainer.evaluate()["eval_shape"] == 2


def test_callbacks_are_not_told_that_evaluation_is_tried(build):
    trainer = build(args={"max_steps": 1})
    trainer.train()
    assert not [log for log in trainer.state.log_history if "eval_loss" in log]


def test_each_of_several_evaluation_sets_is_tried(build):
    def broken(prediction):
        if len(prediction.label_ids) == 5:
            raise ZeroDivisionError("five rows")
        return {}

    sets = {"six": labelled_rows(6, seed=1), "five": labelled_rows(5, seed=2)}
    trainer = build(eval_dataset=sets, compute_metrics=broken, args={"eval_data_is_public": True})
    with pytest.raises(ValueError, match=r"raised ZeroDivisionError: five rows; nothing is spent yet"):
        trainer.train()


# ---- What is saved beside a model ----


def test_the_side_of_padding_is_saved(build, tokenizer, tmp_path):
    """Transformers writes what was an argument of the tokenizer, and not an attribute that was set."""
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    own.padding_side = "left"
    trainer = build(with_lora(one_layer()), processing_class=own, args={"max_steps": 1})
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "left"


# ---- Adapters ----


def test_an_adapter_that_takes_no_part_is_refused_though_the_head_beside_it_does(build):
    model = with_lora(classifier())
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_alpha["default"] = 0
            module.set_scale("default", 1.0)
    trainer = build(model)
    with pytest.raises(RuntimeError, match="both probe points of its adapter"):
        trainer.train()


def test_an_adapter_beside_a_head_is_trained_where_it_takes_part(build):
    trainer = build(with_lora(one_layer()), args={"max_steps": 1})
    trainer.train()
    assert len(trainer.budget.ledger) == 1


def test_losses_alone_compute_no_logits_of_tokens_without_targets(build):
    model = causal_lm()
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [-100, -100, 7]} for _ in range(40)]
    trainer = build(model, train_dataset=rows, eval_dataset=rows[:4], data_collator=None, probe_rows=rows)
    sizes = []
    model.lm_head.register_forward_hook(lambda layer, args, output: sizes.append(output.shape[1]))
    trainer.evaluate()
    assert sizes[-1] == 0


def test_a_function_that_misses_something_else_is_not_taken_for_one_without_labels(build):
    trainer = build(per_example_loss=lambda model, inputs: inputs["weights"])
    with pytest.raises(KeyError, match="weights"):
        trainer.evaluate(labelled_rows(6).remove_columns("labels"))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_losses_that_are_whole_numbers_or_truth_values_are_evaluated(build, kind):
    def loss(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return (logits.argmax(dim=1) != inputs["labels"]).to(kind)

    found = build(per_example_loss=loss, args={"per_device_train_batch_size": 1}).evaluate()
    assert 0 <= found["eval_loss"] <= 1


def test_metrics_that_are_no_numbers_are_left_out_of_the_card(build):
    found = {"text": "good", "truth": True, "nothing": None, "list": [1, 2], "number": np.float32(0.5)}
    trainer = build(compute_metrics=lambda prediction: dict(found), args={"eval_data_is_public": True})
    trainer.train()
    assert trainer.evaluate()["eval_text"] == "good"
    trainer.save_model()
    said = json.loads((Path(trainer.args.output_dir) / "privacy.json").read_text())["evaluation"]["metrics"]
    assert said["eval_number"] == 0.5 and not {"eval_text", "eval_truth", "eval_nothing", "eval_list"} & {*said}


# ---- Rows of several lengths ----


def texts(count, *, seed=0, length=None):
    rows = [row["input_ids"][: length or 9] for row in labelled_rows(count, seed=seed)]
    rows = [ids * 2 if length is None else (ids * 4)[:length] for ids in rows]
    return Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows])


@pytest.fixture
def train_texts(make_args, tokenizer):
    def train(*, length=None, args=None, **changes):
        parts = {"train_dataset": texts(40, length=length), "eval_dataset": texts(6, seed=1, length=length)}
        trainer = ZOTrainer(model=causal_lm(num_hidden_layers=1), args=make_args(**args or {}), **{**parts, **changes})
        trainer.train()
        return trainer

    return train


def test_labels_of_several_lengths_are_padded_by_default(train_texts, tokenizer, caplog):
    """Stock's default collator fails on them; a row's loss is the one that it has alone."""
    with caplog.at_level("WARNING"):
        trainer = train_texts(processing_class=tokenizer)
    assert "data_collator" not in caplog.text
    together, alone = trainer.evaluate(), []
    for row in trainer.eval_dataset:
        alone.append(trainer.predict(Dataset.from_list([row])).metrics["test_loss"])
    assert together["eval_loss"] == pytest.approx(np.mean(alone), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_padded_where_their_tokens_are(tokenizer, side):
    padded = copy.deepcopy(tokenizer)
    padded.padding_side = side
    inputs = PaddingCollator(padded)([dict(row) for row in texts(4)])
    assert ((inputs["labels"] == -100) == (inputs["attention_mask"] == 0)).all()
    assert (inputs["labels"] == -100).any()
    fixed = [{"input_ids": [5] * n, "labels": [0.5, 1.0]} for n in (2, 3)]
    assert PaddingCollator(padded)(fixed)["labels"].tolist() == [[0.5, 1.0]] * 2


@pytest.mark.parametrize("collator", [default_data_collator, DataCollatorWithPadding])
def test_a_run_whose_evaluation_would_fail_does_not_begin(train_texts, tokenizer, tmp_path, collator):
    if collator is DataCollatorWithPadding:
        collator = DataCollatorWithPadding(tokenizer)
    with pytest.raises(ValueError, match=r"data_collator=\w+: public rows of several lengths, .* pads them"):
        train_texts(data_collator=collator)
    assert not [*tmp_path.rglob("trajectory.zo")]


def test_rows_of_one_length_need_no_padding(train_texts, caplog):
    with caplog.at_level("WARNING"):
        assert "eval_loss" in train_texts(length=8).evaluate()
    assert "data_collator" not in caplog.text


def test_rows_that_are_evaluated_alone_are_told_of(train_texts, caplog):
    with caplog.at_level("WARNING"):
        train_texts(eval_dataset=None)
    assert "data_collator=default_data_collator: it can not put rows of several lengths together" in caplog.text


def test_rows_evaluated_one_by_one_may_have_several_lengths(train_texts):
    assert "eval_loss" in train_texts(args={"per_device_eval_batch_size": 1}).evaluate()
