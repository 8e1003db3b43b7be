"""Digests of content: equal for equal rows, and for no others, whatever types the values have."""

import datetime
import enum
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image
from transformers import BatchEncoding

from hf_dpzo.data.content import UnknownContentError, digest_rows, digest_tables, digest_value


class Loud(str):
    """A text that says the same of all its values."""

    def __repr__(self) -> str:
        return "Loud"


class Colour(enum.Enum):
    RED, BLUE = 1, 2


# No two of these are the same.
VALUES = [
    *(None, True, False, 1, 0, 1.0, -0.0, "1", b"1", "", [], {}, set(), [1], ["1"], [[1]], [1, 1], {"a": 1}, {1: "a"}),
    *(
        list(np.array([1, 2])),
        list(np.array([1, 3])),
        np.array([1, 2]),
        np.array([[1, 2]]),
        np.array([1, 2], dtype="i4"),
    ),
    *(np.float32(1), np.float64(1), np.int64(1), np.array([1, "a"], dtype=object), np.array([2, "a"], dtype=object)),
    *(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([[1, 2]]), torch.tensor([1.0]), torch.tensor(1.0)),
    *(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.bfloat16)),
    *(Loud("a"), Loud("b"), Colour.RED, Colour.BLUE, Decimal(1), Decimal("1.0"), Fraction(1, 3), Fraction(2, 3)),
    *(datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), {"a", "b"}, {"a", "c"}, range(3), slice(1, 2)),
    *(
        {"a": [1, {"b": np.int64(4)}]},
        {"a": [1, {"b": np.int64(5)}]},
        ["a", "bc"],
        ["ab", "c"],
        [["a"], "b"],
        ["a", ["b"]],
    ),
]


def test_values_have_the_same_digest_only_if_they_are_the_same():
    digests = [digest_value(value) for value in VALUES]
    assert len(set(digests)) == len(VALUES)
    assert digests == [digest_value(value) for value in VALUES]


def test_how_a_row_is_held_makes_no_difference():
    assert digest_value({"a": [1, 2], "b": 3}) == digest_value({"b": 3, "a": (1, 2)})
    assert digest_value({"a": 1}) == digest_value(BatchEncoding({"a": 1}))
    strided = torch.arange(6).view(2, 3).T
    assert digest_value(strided) == digest_value(strided.contiguous())


def test_another_process_finds_the_same_digest():
    """Sets and hashes have another order there."""
    code = (
        "from hf_dpzo.data.content import digest_value as d; import fractions;"
        "print(d([{'a', 'b', 'c'}, fractions.Fraction(1, 3), {'x': None}]).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) == 65


def test_a_value_that_cannot_be_told_from_others_is_refused():
    with pytest.raises(UnknownContentError, match="train_dataset: its rows hold values that can not be compared"):
        digest_rows([{"tokens": lambda: "a secret"}])


def rows(order):
    return [{"tokens": [number] * (number % 3), "labels": None if number == 4 else number} for number in order]


def test_tables_are_told_apart_by_content_and_not_by_the_name_that_datasets_gave_them(tmp_path):
    path = tmp_path / "order"

    def generate():
        yield from rows(map(int, path.read_text().split()))

    def load(order, cache):
        path.write_text(" ".join(map(str, order)))
        return Dataset.from_generator(generate, cache_dir=str(tmp_path / cache))

    one, two, again = load(range(10), "a"), load([*range(1, 10), 0], "b"), load(range(10), "c")
    assert one._fingerprint == two._fingerprint
    assert digest_tables(one) != digest_tables(two)
    assert digest_tables(one) == digest_tables(again)
    for digest in (digest_tables, digest_rows):
        assert digest(one) == digest(again) == digest(two.select([9, *range(9)])) != digest(two)


def test_chunks_and_orders_of_a_table_make_no_difference():
    table = Dataset.from_list(rows(range(2500)))
    order = np.random.default_rng(0).permutation(2500)
    shuffled = table.select(order).select(np.argsort(order))
    assert digest_tables(table) == digest_tables(shuffled) == digest_tables(shuffled.flatten_indices())
    assert digest_tables(table) == digest_tables(table.with_format("torch"))


def test_rows_without_tables_have_no_digest_of_tables_in_common():
    assert digest_tables(rows(range(3))) != digest_tables(rows(range(3)))
    assert digest_rows(rows(range(3))) == digest_rows(rows(range(3))) != digest_rows(rows(range(2)))


def test_rows_that_a_transform_or_a_file_makes_are_not_told_by_their_tables(tmp_path):
    """Each process has files of its own, and a transform may read them."""
    plain = Dataset.from_dict({"a": [1, 2]})
    assert digest_tables(plain) == digest_tables(plain)
    transformed = plain.with_transform(lambda batch: {"b": batch["a"]})
    assert digest_tables(transformed) != digest_tables(transformed)
    PIL.Image.new("L", (2, 2)).save(tmp_path / "image.png")
    images = Dataset.from_dict({"image": [str(tmp_path / "image.png")]}).cast_column("image", Image())
    assert digest_tables(images) != digest_tables(images)
    before = digest_rows(images)
    assert digest_rows(images) == before
    PIL.Image.new("L", (2, 2), color=200).save(tmp_path / "image.png")
    assert digest_rows(images) != before
