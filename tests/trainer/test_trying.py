"""A run without privacy shows what is wrong with its rows, its loss and its points, as a private one does."""

import peft
import pytest
import torch
from datasets import Dataset

from hf_dpzo import ZOTrainer, seeded_peft_model
from hf_dpzo.isolation.probe import FailedLossError
from hf_dpzo.trainer import callbacks

from support.models import one_layer
from support.rows import labelled_rows
from support.runs import short_args


PUBLIC = {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"}
WITHOUT_NOISE = {"method": "projected", "radius": 1, "noise_multiplier": 0, "target_delta": "absent"}


def make(folder, *, method=PUBLIC, model=None, rows=None, loss=None, **changes) -> ZOTrainer:
    return ZOTrainer(
        model=model or one_layer(),
        args=short_args(folder, **{"max_steps": 1, "expected_batch_size": 4, **method, **changes}),
        train_dataset=labelled_rows(16) if rows is None else rows,
        per_example_loss=loss,
    )


def broken(model, inputs):
    return model(**inputs).logits.no_such_method()


@pytest.mark.parametrize(
    "method", [PUBLIC, {"noise_multiplier": 0, "method": "projected", "radius": 1, "target_delta": "absent"}]
)
def test_a_loss_that_fails_on_every_row_is_shown_as_in_a_private_run(tmp_path, method):
    with pytest.raises(FailedLossError, match="raised AttributeError: 'Tensor' object has no attribute 'no_such_m"):
        make(tmp_path / "private", method={}, loss=broken).train()
    with pytest.raises(FailedLossError, match="first 8 rows raised AttributeError: 'Tensor' object has no attribute"):
        make(tmp_path / "public", method=method, loss=broken).train()


def test_a_loss_that_draws_or_that_is_not_finite_on_every_row_is_shown(tmp_path):
    def drawing(model, inputs):
        return torch.rand(len(inputs["labels"]))

    def infinite(model, inputs):
        return torch.full((len(inputs["labels"]),), torch.inf)

    with pytest.raises(FailedLossError, match="GlobalRandomnessError: per_example_loss: it draws from a global"):
        make(tmp_path, loss=drawing).train()
    with pytest.raises(FailedLossError, match="raised ValueError: the loss is not finite"):
        make(tmp_path, loss=infinite).train()


def test_rows_longer_than_all_public_lengths_are_shown(tmp_path):
    with pytest.raises(FailedLossError, match="the loss is not finite"):
        make(tmp_path, padded_lengths=[2]).train()


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 12:
            return labelled_rows(16)[12]
        raise OSError("no such file")


def test_rows_that_cannot_be_read_are_shown(tmp_path):
    with pytest.raises(ValueError, match=r"first .*rows"):
        make(tmp_path, rows=Unreadable()).train()


def test_a_loss_that_made_up_rows_do_not_suit_is_trained_where_real_rows_do(tmp_path):
    known = {tuple(row["input_ids"]) for row in labelled_rows(16)}

    def choosy(model, inputs):
        ids = [tuple(i for i in row if i) for row in inputs["input_ids"].tolist()]
        assert known >= set(ids)
        return torch.nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"], reduction="none")

    trainer = make(tmp_path, loss=choosy)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    after = trainer.model.parameters()
    assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_few_rows_that_fail_stop_no_run(tmp_path):
    rows = [*labelled_rows(16).to_list()[:14], *[{"input_ids": [63, 999], "attention_mask": [1, 1], "labels": 0}] * 2]
    make(tmp_path, rows=Dataset.from_list(rows[::-1])).train()


@pytest.mark.parametrize("method", [PUBLIC, {}], ids=["mezo", "dpzero"])
def test_an_adapter_that_several_points_at_once_do_not_suit_is_shown(tmp_path, method):
    config = peft.LoHaConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    model = seeded_peft_model(one_layer(), config, seed=0)
    with pytest.raises(ValueError, match=r"points_per_pass=2: at several points at once .* fails, .*; remove it\.$"):
        make(tmp_path, method=method, model=model, points_per_pass=2).train()


def test_a_run_in_which_no_loss_ever_differed_is_warned_of(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(callbacks.logger, "warning", told.append)

    def flat(model, inputs):  # What the model returns moves, and the loss does not.
        return (model(**inputs).logits.sum(dim=1) > 1e9).float()

    make(tmp_path / "flat", loss=flat).train()
    assert len(told) == 1 and "nothing was trained" in told[0]
    make(tmp_path / "steep").train()
    assert len(told) == 1
