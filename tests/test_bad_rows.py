"""A row that somebody's code fails on contributes nothing, and nothing shows that there was one."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import classifier, labelled_rows
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.noise import BernoulliMask, DiscreteGaussian


ROWS, MARK = 9, 63  # A token that no made-up or other row of these tests has.


@pytest.fixture
def sums(monkeypatch) -> list[list[int]]:
    """The sums that noise would be added to, with everybody in each batch. There is no noise."""
    seen = []
    monkeypatch.setattr(DiscreteGaussian, "add", lambda one, values: seen.append(values) or values)
    monkeypatch.setattr(BernoulliMask, "draw", lambda mask: np.ones(mask.size, dtype=bool))
    return seen


def loss_of(act):
    """A loss that does something of its own where a batch holds the marked row."""

    def loss(model, inputs):
        logits = model(input_ids=inputs["input_ids"] % 64, attention_mask=inputs["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        return act(losses, (inputs["input_ids"] == MARK).any(dim=1))

    return loss


def raising(losses, marked):
    if marked.any():
        raise IndexError(f"Target {MARK} is out of bounds.")
    return losses


WAYS = {
    "nan": lambda losses, marked: torch.where(marked, math.nan, losses),
    "infinite": lambda losses, marked: torch.where(marked, math.inf, losses),
    "raises": raising,
    "too few": lambda losses, marked: losses[~marked],
    "no tensor": lambda losses, marked: None if marked.any() else losses,
}


def collate_failing(tokenizer):
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows):
        if any(MARK in list(row["input_ids"]) for row in rows):
            raise KeyError(MARK)
        return pad(rows)

    return collate


class Failing(torch.utils.data.Dataset):
    """Rows of which the marked one can not be read."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        if MARK in row["input_ids"]:
            raise OSError(f"row {index} is damaged")
        return row


@pytest.fixture
def train(make_args, tokenizer, sums):
    def run(bad, *, loss=None, collate=None, rows=None, **changes) -> tuple[list, str]:
        """The sums of a run in which one row is bad, or is left out altogether."""
        torch.manual_seed(0)
        data = labelled_rows(ROWS).to_list()
        marked = {"input_ids": [5, MARK, 7], "attention_mask": [1, 1, 1], "labels": 1}
        data = [*data[:4], marked, *data[4:]] if bad else data
        data = (rows or (lambda some: some))(data)
        args = make_args(expected_batch_size=4, per_device_train_batch_size=1, max_steps=1, **changes)
        trainer = ZOTrainer(
            model=classifier(),
            args=args,
            train_dataset=data,
            per_example_loss=loss,
            data_collator=(collate or DataCollatorWithPadding)(tokenizer),
        )
        trainer.train()
        return sums.pop(), args.output_dir

    return run


def test_losses_that_fail_are_those_of_a_row_that_is_not_there(train):
    without, _ = train(False, loss=loss_of(lambda losses, marked: losses))
    kept, _ = train(True, loss=loss_of(lambda losses, marked: losses))
    assert without != kept
    for way in WAYS.values():
        for size in (1, 4):
            bad, _ = train(True, loss=loss_of(way), padded_lengths=[16] if size > 1 else None)
            assert bad == without


@pytest.mark.parametrize("size", [1, 5])
def test_rows_beside_one_that_fails_keep_their_part(train, size, make_args):
    """Also where they shared its micro-batch."""
    without, _ = train(False)
    failed, _ = train(True, collate=collate_failing)
    unread, _ = train(True, rows=Failing)
    assert without == failed == unread


def test_classes_and_tokens_that_are_none_contribute_nothing(train):
    without, _ = train(False)

    def with_wrong_class(rows):
        return [{**row, "labels": 7} if MARK in row["input_ids"] else row for row in rows]

    def with_wrong_token(rows):
        return [{**row, "input_ids": [5, 10**6, 7]} if MARK in row["input_ids"] else row for row in rows]

    def without_label(rows):
        return [{"input_ids": [MARK]} if MARK in row["input_ids"] else row for row in rows]

    def of_nothing(rows):
        return [None if MARK in row["input_ids"] else row for row in rows]

    for spoiled in (with_wrong_class, with_wrong_token, without_label, of_nothing):
        assert train(True, rows=spoiled)[0] == without


def test_rows_beyond_all_public_lengths_contribute_nothing(train):
    def with_long(rows):
        long = {"input_ids": [5] * 40, "attention_mask": [1] * 40}
        return [{**row, **long} if MARK in row["input_ids"] else row for row in rows]

    without, _ = train(False, padded_lengths=[8, 16])
    assert train(True, rows=with_long, padded_lengths=[8, 16])[0] == without


def test_nothing_shows_a_bad_row(train, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    shown = []
    for bad in (False, True):
        _, folder = train(bad, loss=loss_of(raising), log_level="debug")
        captured = capsys.readouterr()
        text = (captured.out + captured.err + caplog.text).replace(folder, "")
        shown.append([line for line in text.splitlines() if "Num examples" not in line and "out of bounds" in line])
        caplog.clear()
        assert not [path for path in Path(folder).rglob("*") if b"out of bounds" in path.read_bytes()]
    assert shown == [[], []]
