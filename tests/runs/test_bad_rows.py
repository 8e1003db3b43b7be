"""A row that somebody's code fails on contributes nothing, and nothing shows that there was one."""

import logging
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithPadding, default_data_collator

from hf_dpzo import ZOTrainer

from support.models import one_layer
from support.rows import few_public_rows, labelled_rows


ROWS, MARK = 9, 63  # A token that no made-up or other row of these tests has.


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
        args = make_args(**{"expected_batch_size": 4, "per_device_train_batch_size": 1, "max_steps": 1, **changes})
        trainer = ZOTrainer(
            model=one_layer(),
            args=args,
            train_dataset=data,
            per_example_loss=loss,
            data_collator=(collate or DataCollatorWithPadding)(tokenizer),
            probe_rows=few_public_rows(),
        )
        trainer.train()
        return sums.pop(), args.output_dir

    return run


def test_losses_that_fail_are_those_of_a_row_that_is_not_there(train):
    without, _ = train(False, loss=loss_of(lambda losses, marked: losses))
    kept, _ = train(True, loss=loss_of(lambda losses, marked: losses))
    assert without != kept
    assert all(train(True, loss=loss_of(way))[0] == without for way in WAYS.values())


@pytest.mark.parametrize("way", WAYS)
def test_rows_beside_one_that_fails_keep_their_part(train, way):
    """Where they shared its micro-batch, to the last bit in public shapes."""
    together = {"per_device_train_batch_size": 4, "padded_lengths": [16]}
    without, _ = train(False, loss=loss_of(lambda losses, marked: losses), **together)
    assert train(True, loss=loss_of(WAYS[way]), **together)[0] == without


@pytest.mark.parametrize("size", [1, 5])
def test_rows_beside_one_that_can_not_be_read_or_collated_keep_their_part(train, size):
    together = {"per_device_train_batch_size": size, "padded_lengths": [16]}
    without, _ = train(False, **together)
    assert train(True, collate=collate_failing, **together)[0] == without
    assert train(True, rows=Failing, **together)[0] == without


def test_collators_take_nothing_from_a_row_of_other_types(train):
    """The stock ones take fields and types from whichever row is first."""

    def of_another_type(rows):
        return [{**row, "attention_mask": None} if MARK in row["input_ids"] else row for row in rows]

    def short(rows):
        return [{**row, "input_ids": row["input_ids"][:3], "attention_mask": [1] * 3} for row in rows]

    def it_alone(rows):
        return [row for row in of_another_type(rows) if MARK in row["input_ids"]]

    collate = {"collate": lambda tokenizer: default_data_collator}
    (without,), _ = train(False, rows=short, per_device_train_batch_size=9, **collate)
    (alone,), _ = train(True, rows=it_alone, expected_batch_size=1, target_delta=1e-2, **collate)
    (both,), _ = train(True, rows=lambda rows: of_another_type(short(rows)), per_device_train_batch_size=9, **collate)
    assert both - without == alone != 0


def test_warnings_and_logs_about_rows_are_dropped(train, capsys, caplog, recwarn):
    def talking(losses, marked):
        if marked.any():
            warnings.warn("a secret", stacklevel=1)
            logging.getLogger("transformers").warning("a secret")
            sys.stderr.write("a secret")
            sys.stdout.write("a secret")
        return losses

    train(True, loss=loss_of(talking))
    captured = capsys.readouterr()
    assert "a secret" not in captured.out + captured.err + caplog.text
    assert not [one for one in recwarn if "a secret" in str(one.message)]


@pytest.mark.parametrize("bad", [{"input_ids": torch.tensor(5)}, {"input_ids": 7, "labels": 1}, 5, "text", [1, 2]])
def test_rows_of_any_kind_are_survived(train, bad):
    def spoiled(rows):
        return [bad if isinstance(row, dict) and MARK in row["input_ids"] else row for row in rows]

    assert train(True, rows=spoiled)[0] == train(False)[0]


def test_rows_that_workers_can_not_send_contribute_nothing(train):
    def unsendable(rows):
        return [{**row, "extra": (i for i in ())} if MARK in row["input_ids"] else row for row in rows]

    workers = {"dataloader_num_workers": 1, "remove_unused_columns": False}
    assert train(True, rows=unsendable, **workers)[0] == train(False, **workers)[0]


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


def test_what_an_error_says_is_shown_nowhere(train, capsys, caplog):
    """That there was one is hidden too, which the twin run shows."""
    caplog.set_level(logging.DEBUG)
    _, folder = train(True, loss=loss_of(raising), log_level="debug")
    captured = capsys.readouterr()
    assert "out of bounds" not in captured.out + captured.err + caplog.text
    assert not [path for path in Path(folder).rglob("*") if path.is_file() and b"out of bounds" in path.read_bytes()]
