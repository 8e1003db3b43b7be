"""Training data of the library `datasets`, in each form that it gives them."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.table import MemoryMappedTable
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer

from support.models import one_layer, with_lora
from support.rows import few_public_rows, labelled_rows


ROWS = 40
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": ClassLabel(names=["bad", "good"]),
    }
)


def texts() -> Dataset:
    draw = random.Random(0)
    words = [[f"w{draw.randrange(40)}" for _ in range(draw.randrange(3, 10))] for _ in range(ROWS)]
    return Dataset.from_list([{"text": " ".join(row), "labels": int("w7" in row)} for row in words])


@pytest.fixture
def tokens(tokenizer) -> Callable[[dict], dict]:
    """What `map` and `with_transform` make of a batch of texts."""
    return lambda batch: {
        "input_ids": (ids := [tokenizer(text)["input_ids"] for text in batch["text"]]),
        "attention_mask": [[1] * len(row) for row in ids],
        "labels": batch["labels"],
    }


@pytest.fixture
def make(make_args, tokenizer):
    def trainer(rows, **changes) -> ZOTrainer:
        torch.manual_seed(0)  # The same weights each time.
        return ZOTrainer(
            model=with_lora(one_layer()),
            args=make_args(**{"max_steps": 2, **changes}),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            probe_rows=few_public_rows(),
        )

    return trainer


def on_disk(rows: Dataset, folder: Path) -> Dataset:
    rows.save_to_disk(folder / "rows")
    return load_from_disk(folder / "rows")


def halves(rows: Dataset) -> list[Dataset]:
    return [rows.select(range(0, ROWS, 2)), rows.select(range(1, ROWS, 2))]


FORMS = {
    "as it is": lambda rows, folder: rows,
    "filtered": lambda rows, folder: rows.filter(lambda row: len(row["input_ids"]) > 4),
    "selected": lambda rows, folder: rows.select(range(1, ROWS, 2)),
    "shuffled": lambda rows, folder: rows.shuffle(seed=3),
    "as tensors": lambda rows, folder: rows.with_format("torch"),
    "as arrays": lambda rows, folder: rows.with_format("numpy"),
    "concatenated": lambda rows, folder: concatenate_datasets(halves(rows)),
    "interleaved": lambda rows, folder: interleave_datasets(halves(rows), probabilities=[0.3, 0.7], seed=3),
    "mapped from disk": on_disk,
    "shuffled on disk": lambda rows, folder: on_disk(rows, folder).shuffle(seed=3),
    "generated": lambda rows, folder: Dataset.from_generator(
        lambda: iter(rows), features=FEATURES, cache_dir=str(folder)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_rows_gives_the_same_sums(form, make, tokens, sums, tmp_path):
    rows = FORMS[form](texts().map(tokens, batched=True, batch_size=7, remove_columns="text"), tmp_path)
    make(rows).train()
    found = sums.copy()
    sums.clear()
    make([dict(row) for row in rows.with_format(None)]).train()
    assert found == sums
    assert any(any(step) for step in found)


def test_a_transform_sees_one_row_at_a_time(make, tokens, sums):
    sizes = []

    def transform(batch: dict) -> dict:
        sizes.append(len(batch["text"]))
        return tokens(batch)

    make(texts().with_transform(transform), remove_unused_columns=False).train()
    assert set(sizes) == {1} and len(sizes) >= 2 * ROWS
    found = sums.copy()
    sums.clear()
    make(texts().map(tokens, batched=True, remove_columns="text")).train()
    assert found == sums


@pytest.mark.parametrize("changes", [{}, {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"}])
def test_a_transform_without_its_columns_is_refused(make, tokens, changes):
    """Stock, each row would raise an error; here each would contribute nothing."""
    trainer = make(texts().with_transform(tokens), **changes)
    with pytest.raises(ValueError, match=r"its transform would be given rows without text, .*remove_unused_columns=F"):
        trainer.train()


def test_a_transform_that_fails_on_the_first_rows_is_refused(make):
    trainer = make(texts().with_transform(lambda batch: batch["another"]), remove_unused_columns=False)
    with pytest.raises(ValueError, match="train_dataset: its first rows fail"):
        trainer.train()


def test_several_data_sets_are_refused(make):
    with pytest.raises(ValueError, match=r'train_dataset=DatasetDict: .* such as train_dataset\["train"\]'):
        make(DatasetDict({"train": labelled_rows(ROWS), "test": labelled_rows(ROWS)}))


# ---- One row under several numbers ----


def numbered(first: int, count: int) -> Dataset:
    return labelled_rows(count, seed=first).add_column("number", list(range(first, first + count)))


def test_a_row_that_is_picked_twice_is_refused_and_trains_as_a_unit(make):
    twice = interleave_datasets([numbered(0, 10), numbered(10, 30)], stopping_strategy="all_exhausted").shuffle(seed=1)
    assert len(twice) == 60
    with pytest.raises(ValueError, match=r"it holds a row more than once, .* privacy_unit_column"):
        make(twice)
    trainer = make(twice, privacy_unit_column="number", max_rows_per_unit=3)
    assert trainer.budget.query.sampling_rate == 8 / 40
    trainer.train()
    assert len(trainer.budget.ledger) == 2


def test_a_run_without_privacy_may_repeat_rows(make):
    make(
        labelled_rows(ROWS).select([*range(ROWS), 0, 0]),
        method="mezo",
        noise_multiplier="absent",
        target_delta="absent",
    ).train()


# ---- More rows than memory ----


MANY = 20_000
LENGTH = 40


def written_rows(path: Path) -> Path:
    draw = random.Random(0)

    def lines() -> Iterator[str]:
        for _ in range(MANY):
            ids = [draw.randrange(4, 48) for _ in range(LENGTH)]
            yield json.dumps({"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": int(ids[0] >= 26)}) + "\n"

    with path.open("w") as file:
        file.writelines(lines())
    return path


def test_a_stream_is_refused_and_trains_from_disk(make, tmp_path):
    """As the sentence says. What is trained on stays on disk."""
    path = written_rows(tmp_path / "rows.jsonl")
    stream = load_dataset("json", data_files=str(path), split="train", streaming=True, features=FEATURES)
    with pytest.raises(ValueError, match=r"IterableDataset: .* pass datasets.Dataset.from_generator\(lambda: rows\)"):
        make(stream)

    before = pyarrow.total_allocated_bytes()
    rows = Dataset.from_generator(lambda: stream, features=stream.features, cache_dir=str(tmp_path / "cache"))
    rows = on_disk(rows, tmp_path)
    assert len(rows) == MANY and rows.features == FEATURES
    trainer = make(rows, expected_batch_size=64, max_steps=3, target_delta=1e-6)
    trainer.train()
    assert len(trainer.budget.ledger) == 3
    assert isinstance(trainer.train_dataset.data, MemoryMappedTable)
    assert pyarrow.total_allocated_bytes() - before < rows.data.nbytes / 10
