"""The rows of a task as features of a frozen model, which are computed once and kept in a file."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.recipe.loading import load_model, load_rows, load_tokenizer
from hf_dpzo.recipe.recipe import parse_recipe
from hf_dpzo.recipe.untouched import measure_untouched


# The most rows of one length that are read at once.
ROWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows as features, and the class of each.

    Args:
        features: one vector of norm 1 for each row, `[rows, width]`.
        labels: the number of the class of each row, `[rows]`.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Table":
        return Table(features=self.features[rows], labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The rows of a task.

    Args:
        train: the rows that are trained on.
        tuning: rows on which learning rates are chosen, and nothing else.
        test: rows that nothing looks at but the result.
        untouched: the accuracy on the test rows of the model itself, by label words; NaN for an encoder.
    """

    train: Table
    tuning: Table
    test: Table
    untouched: float


def read_task(task: Mapping[str, Any], shared: Mapping[str, Any], file: Path, flags: Sequence[str] = ()) -> None:
    """Compute the features of a task's rows, and keep them in `file`.

    Args:
        task: the fields of its recipe, `train_rows` and `test_rows`.
        shared: the fields that all recipes share.
        file: the file.
        flags: flags that replace fields of the recipe.
    """
    fields = {name: value for name, value in task.items() if name not in ("train_rows", "test_rows")}
    recipe, _ = parse_recipe({**shared, **fields}, flags)
    tokenizer = load_tokenizer(recipe)
    parts = dict(zip(("train", "test"), load_rows(recipe, tokenizer), strict=True))
    model = load_model(recipe, tokenizer, seed=0)
    columns: dict[str, torch.Tensor] = {}
    for name, rows in parts.items():
        chosen = rows.select(_choose(len(rows), task[f"{name}_rows"]))
        columns[f"{name}.features"] = _read(model, chosen["input_ids"])
        columns[f"{name}.labels"] = torch.tensor(chosen["labels"])
        parts[name] = chosen
    untouched = measure_untouched(recipe, tokenizer, batch_size=ROWS_AT_ONCE)["accuracy"] if recipe.words else math.nan
    columns["untouched"] = torch.tensor(untouched, dtype=torch.float64)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(columns, file)


def load_task(file: Path, *, tuning_rows: int) -> TaskRows:
    """Return the rows that `read_task` kept in `file`, of which `tuning_rows` training rows are set aside."""
    columns = load_file(file)
    train, test = (
        Table(features=columns[f"{name}.features"], labels=columns[f"{name}.labels"]) for name in ("train", "test")
    )
    return TaskRows(
        train=train[tuning_rows:], tuning=train[:tuning_rows], test=test, untouched=columns["untouched"].item()
    )


def _choose(size: int, count: int) -> list[int]:
    """Return the numbers of `count` of `size` rows, the same each time, in an order of no meaning."""
    numbers = list(range(size))
    random.Random(0).shuffle(numbers)
    return numbers[:count]


def _read(model: FeatureClassifier, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the features of rows of tokens, `[rows, width]`."""
    features = torch.empty(len(rows), model.config.hidden_size)
    for numbers in _group_by_length(rows):
        features[numbers] = model.compute_features(torch.tensor([rows[number] for number in numbers]))
    return features


def _group_by_length(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    numbers = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for _, group in groupby(numbers, key=lambda number: len(rows[number])):
        alike = list(group)
        for start in range(0, len(alike), ROWS_AT_ONCE):
            yield alike[start : start + ROWS_AT_ONCE]
