"""Runs whose rows would fail do not begin, and a run may release how many did."""

import copy
import json

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainerCallback,
)

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.data.first_rows import find_common_facts
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.trainer.reporting import REPORT_FILE, FailedRows
from hf_dpzo.trajectory.run import LoggedRun
from hf_dpzo.verification.verify import verify

from support.bases import load
from support.models import causal_lm, one_layer, with_lora, word_tokenizer
from support.runs import short_args


def bert(kind=BertForSequenceClassification, **changes):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(BertConfig(**{**sizes, "intermediate_size": 32, "max_position_embeddings": 32, **changes}))


def rows(count=40, *, tokens=5, labels=lambda index: index % 2, **changed) -> Dataset:
    made = [
        {"input_ids": [5 + index % 9] * tokens, "attention_mask": [1] * tokens, "labels": labels(index)}
        for index in range(count)
    ]
    for index, row in changed.get("replaced", {}).items():
        made[index] = {**made[index], **row}
    return Dataset.from_list(made)


def trainer(tmp_path, model, train, evaluation=None, *, collator=DataCollatorWithPadding, **changes) -> ZOTrainer:
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.padding_side = "right"
    return ZOTrainer(
        model=model,
        args=short_args(tmp_path / "out", **{"max_steps": 1, **changes}),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=collator(tokenizer),
    )


@pytest.fixture
def refused(tmp_path):
    def refuse(message, *parts, **changes) -> str:
        made = trainer(tmp_path, *parts, **changes)
        with pytest.raises(ValueError, match=message) as caught:
            made.train()
        assert not len(made.budget.ledger) and not (tmp_path / "out" / "trajectory.zo").exists()
        return str(caught.value)

    return refuse


LONG = {"input_ids": [5] * 40, "attention_mask": [1] * 40}


def test_rows_longer_than_the_positions_are_foreseen(refused):
    said = refused("max_position_embeddings=32: the model fails on a made-up row", bert(), rows(tokens=40))
    assert "40" not in said  # Lengths of private rows are not shown.
    refused("max_position_embeddings=32", bert(), rows(replaced={0: LONG}), padded_lengths=[64])
    short = {"input_ids": [5], "attention_mask": [1]}
    refused("max_position_embeddings=32", bert(), rows(tokens=40, replaced={3: short}))


def test_one_long_row_decides_nothing(tmp_path):
    trainer(tmp_path, bert(), rows(replaced={0: LONG})).train()


def test_models_without_a_table_of_positions_take_longer_rows(tmp_path):
    trainer(tmp_path, one_layer(max_position_embeddings=16), rows(tokens=40)).train()


def test_classes_that_the_data_state_need_outputs(refused, tmp_path):
    three = ClassLabel(names=["a", "b", "c"])
    data = rows(labels=lambda index: index % 3).cast_column("labels", three)
    refused("labels: the data state 3 classes and the model has 2 outputs", one_layer(), data)
    refused("load the model with num_labels=3", bert(), data)
    own = one_layer()
    own.__class__ = type("Mine", (type(own),), {})
    refused("labels: the data state 3 classes and the model has 2 outputs", own, data)
    trainer(tmp_path, one_layer(num_labels=3), data).train()


def test_tokens_of_the_tokenizer_need_embeddings(refused):
    refused(
        r"processing_class: it has 48 tokens and the model knows 20.*resize_token_embeddings\(48\)",
        one_layer(vocab_size=20),
        rows(),
    )


def test_rows_without_targets_are_refused(refused, tmp_path):
    none = {"labels": lambda index: [-100] * 5}
    parts = {"collator": DataCollatorForSeq2Seq}
    refused("train_dataset: its first rows have no targets", causal_lm(), rows(**none), **parts)
    some = rows(labels=lambda index: [5] * 5 if index % 2 else [-100] * 5)
    evaluated = {"eval_data_is_public": True, **parts}
    refused("eval_dataset: none of its 8 rows has a target", causal_lm(), some, rows(8, **none), **evaluated)
    trainer(tmp_path, causal_lm(), some, **parts).train()


BAD = {
    "long": (LONG, "RuntimeError"),
    "token": ({"input_ids": [64] * 5}, "IndexError"),
    "class": ({"labels": 5}, "IndexError|RuntimeError"),
    "negative class": ({"labels": -1}, "IndexError|RuntimeError"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD)
def test_public_rows_that_fail_are_counted_before_anything_is_spent(refused, tmp_path, bad, reason):
    evaluation = rows(30, replaced={7: bad, 9: bad})
    message = f"eval_dataset: 2 of its 30 rows fail in the model or its loss, first row 7 \\(.*({reason}|not finite)"
    refused(message, bert(), rows(), evaluation, eval_data_is_public=True)
    trainer(tmp_path, bert(), rows(), evaluation).train()  # Nothing is said of rows that are not public.


def test_common_facts_are_those_of_all_rows_but_one():
    row, other = {"input_ids": [5] * 9, "labels": [-100] * 9}, {"input_ids": [5], "labels": [5]}
    for others in range(4):
        facts = find_common_facts([*[other] * others, *[row] * (9 - others)])
        assert (facts.least_tokens == 9, facts.lack_targets) == (others < 2, others < 2)
    assert find_common_facts([row] * 2).least_tokens == 0

    class Failing(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            raise KeyError("a secret")

    assert not find_common_facts(Failing()).lack_targets


def test_recipes_cut_rows_to_the_positions_of_their_model(write, workplace, tokenizer):
    bert().save_pretrained(workplace / "bert")
    tokenizer.save_pretrained(workplace / "bert")
    (workplace / "rows.csv").write_text("text,label\n" + "".join(f"{'w1 ' * 50},{index % 2}\n" for index in range(80)))
    changes = {"task": "sequence-classification", "template": "{text}", "adapter": "none", "max_length": 128}
    made = build_trainer(*read_recipe(write(model_name_or_path=str(workplace / "bert"), **changes)))
    assert {len(row) for row in made.train_dataset["input_ids"]} <= {31, 32} and made.longest_row == 32


# ---- The count of failing rows ----


def failing_rows(count):
    """Rows of which every fourth has a class that the model does not have."""
    return rows(count, labels=lambda index: index % 2 if index % 4 else 7)


def test_the_count_of_failing_rows_is_close_and_within_the_budget(tmp_path):
    changes = {
        "noise_multiplier": "absent",
        "target_epsilon": 4,
        "report_failed_rows": 0.02,
        "expected_batch_size": 400,
    }
    changes |= {"target_delta": 1e-5, "per_device_train_batch_size": 400}
    made = trainer(tmp_path, one_layer(), failing_rows(1600), **changes)
    output = made.train()
    assert output.metrics["failed_rows"] == made.failed_rows.share
    assert abs(made.failed_rows.share - 0.25) < 5 * made.failed_rows.deviation < 0.2
    assert 3.9 < output.metrics["epsilon"] <= 4
    assert "give or take" in str(made.failed_rows)
    (query, count), *_ = made.budget.report
    assert count == 1 and (query, 1) in made.budget.claimed_releases
    assert LoggedRun.from_log(Trajectory.read(tmp_path / "out")).budget.has_same_plan(made.budget)


def test_a_count_costs_about_its_share(tmp_path):
    args = {share: short_args(tmp_path, max_steps=200, report_failed_rows=share) for share in (None, 0.02)}
    spent = {share: one.plan(1000)[1].guarantee().epsilon for share, one in args.items()}
    assert 0.98 <= spent[None] / spent[0.02] < 0.99


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_a_count_is_within_the_target_of_all_trials(tmp_path, noise):
    target = {"noise_multiplier": "absent", "target_epsilon": 2, "trials": 3, "report_failed_rows": 0.1}
    _, budget = short_args(tmp_path, method="dpzo", noise=noise, max_steps=50, **target).plan(1000)
    guarantee = budget.guarantee()
    assert 1.9 < (guarantee.epsilon if noise == "gaussian" else guarantee.pure) <= 2
    assert budget.report[0][1] == 3


def test_a_resumed_run_counts_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    made = trainer(tmp_path, one_layer(), failing_rows(40), report_failed_rows=0.1)
    made.train()
    first = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    torch.manual_seed(0)
    again = trainer(tmp_path, one_layer(), failing_rows(40), report_failed_rows=0.1)
    monkeypatch.setattr("hf_dpzo.trainer.trainer.release_report", None)
    again.train(resume_from_checkpoint=True)
    assert again.failed_rows == FailedRows(**first)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_count_that_was_lost_is_not_released_again(tmp_path, monkeypatch, damage):
    torch.manual_seed(0)
    trainer(tmp_path, one_layer(), failing_rows(40), report_failed_rows=0.1).train()
    damage(tmp_path / "out" / REPORT_FILE)
    torch.manual_seed(0)
    again = trainer(tmp_path, one_layer(), failing_rows(40), report_failed_rows=0.1)
    monkeypatch.setattr("hf_dpzo.trainer.trainer.release_report", None)
    again.train(resume_from_checkpoint=True)
    assert again.failed_rows is None


def test_a_run_that_stops_early_counts_when_it_goes_on_to_its_end(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    def build() -> ZOTrainer:
        torch.manual_seed(0)
        return trainer(tmp_path, one_layer(), failing_rows(40), report_failed_rows=0.1, max_steps=2)

    first = build()
    first.add_callback(Stop())
    first.train()
    assert first.failed_rows is None and not (tmp_path / "out" / REPORT_FILE).exists()
    again = build()
    again.train(resume_from_checkpoint=True)
    assert again.failed_rows is not None


def test_users_are_counted_once_each(tmp_path):
    data = failing_rows(400).add_column("user", [index // 4 for index in range(400)])
    changes = {"privacy_unit_column": "user", "report_failed_rows": 0.5, "target_delta": 1e-3}
    made = trainer(tmp_path, one_layer(), data, expected_batch_size=50, **changes)
    made.train()
    # Each user has rows that do not fail.
    assert abs(made.failed_rows.share) < 5 * made.failed_rows.deviation


def test_a_count_is_written_in_the_card_and_verified(tmp_path, base):
    made = trainer(tmp_path, with_lora(load(base)), rows(), report_failed_rows=0.1)
    made.train()
    made.save_model()
    assert "A noisy count of the rows on which training fails" in (tmp_path / "out" / "README.md").read_text()
    assert not [one for one in verify(tmp_path / "out", base=str(base)) if one.holds is False]
    statement = json.loads((tmp_path / "out" / "privacy.json").read_text())
    del statement["claim"]["report"]
    (tmp_path / "out" / "privacy.json").write_text(json.dumps(statement))
    assert [one for one in verify(tmp_path / "out", base=str(base)) if one.holds is False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_failed_rows": 0.9}, "report_failed_rows=0.9: it is a share of the budget"),
        ({"report_failed_rows": 0}, "report_failed_rows=0: it must be positive"),
        (
            {"report_failed_rows": 0.1, "method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"},
            "report_failed_rows=0.1: without noise there is no budget to pay from",
        ),
    ],
)
def test_shares_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        short_args(tmp_path, **changes)
