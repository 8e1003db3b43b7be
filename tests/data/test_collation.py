"""What a logical batch is made of."""

import pytest
import torch

from hf_dpzo.data.collation import LogicalBatchCollator, stretch_row
from hf_dpzo.data.sampling import FetchedRow


def lengths(rows):
    return [len(row["input_ids"]) for row in rows]


def fetched(*rows):
    return [FetchedRow(unit=unit, row=row, slot=unit) for unit, row in enumerate(rows)]


def of_length(*sizes):
    return fetched(*({"input_ids": [7] * size} for size in sizes))


def padded(rows):
    """As a collator that pads to the longest row."""
    width = max(lengths(rows))
    return {"input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])}


def made(rows, **options):
    return LogicalBatchCollator(**{"collate": lengths, "micro_batch_size": 2, **options})(rows)["batch"]


def test_rows_are_cut_into_micro_batches_in_order_of_length():
    batch = made(of_length(5, 1, 4, 2, 3))
    assert [one.inputs for one in batch.micro_batches] == [[1, 2], [3, 4], [5]]
    assert [one.size for one in batch.micro_batches] == [2, 2, 1]
    assert batch.row_units == [1, 3, 4, 2, 0]
    assert batch.num_units == 5


def test_empty_batch_has_no_micro_batches():
    assert (made([]).micro_batches, made([]).num_units, made([]).row_units) == ((), 0, [])


def test_rows_without_tokens_keep_their_order():
    assert made(fetched(3, 1, 2), collate=list, micro_batch_size=3).micro_batches[0].inputs == [3, 1, 2]


@pytest.mark.parametrize("sizes", [(1,), (3, 3), (1, 2, 3, 4, 5, 6, 7, 8), (8, 8, 8, 8), (4,) * 9])
def test_padded_micro_batches_have_public_shapes_alone(sizes):
    """Full, and with a row of the padded length in each, to which any collator pads."""
    batch = made(of_length(*sizes), collate=padded, padded_lengths=(4, 8), micro_batch_size=3)
    assert {tuple(one.inputs["input_ids"].shape) for one in batch.micro_batches} <= {(3, 4), (3, 8)}
    assert all(one.size == 3 for one in batch.micro_batches)
    assert sorted(batch.row_units) == list(range(len(sizes)))


def test_rows_longer_than_all_padded_lengths_are_left_out():
    batch = made(of_length(2, 9, 3), padded_lengths=(4, 8))
    assert sorted(batch.row_units) == [0, 2]
    assert batch.num_units == 3


def test_rows_that_could_not_be_fetched_are_left_out():
    batch = made(fetched({"input_ids": [1]}, None, {"input_ids": [1, 2]}))
    assert (batch.row_units, batch.num_units) == ([0, 2], 3)


def test_where_one_row_can_not_be_collated_the_others_are_collated_one_by_one():
    def collate(rows):
        if any(9 in row["input_ids"] for row in rows):
            raise KeyError(9)
        return lengths(rows)

    batch = made(fetched({"input_ids": [1]}, {"input_ids": [9]}, {"input_ids": [2]}), collate=collate)
    assert [one.inputs for one in batch.micro_batches] == [[1], None, [1]]


def test_rows_taken_apart_keep_the_public_shape():
    collator = LogicalBatchCollator(collate=padded, micro_batch_size=4, padded_lengths=(8,))
    (one,) = collator(of_length(3, 5, 2))["batch"].micro_batches
    parts = collator.split_into_rows(one)
    assert [tuple(part.inputs["input_ids"].shape) for part in parts] == [(4, 8)] * 3
    assert [[row.unit for row in part.rows] for part in parts] == [[2], [0], [1]]


def test_a_collator_that_does_not_pad_to_the_longest_row_makes_no_public_shape():
    def cutting(rows):
        return {"input_ids": torch.zeros(len(rows), 3)}

    assert made(of_length(2, 3), collate=cutting, padded_lengths=(8,)).micro_batches[0].inputs is None


def test_rows_of_other_fields_or_types_have_micro_batches_of_their_own():
    rows = fetched(
        {"input_ids": [1], "labels": 1},
        {"input_ids": [1], "labels": None},
        {"input_ids": [1]},
        {"input_ids": [1], "labels": 0.5},
        {"input_ids": [2], "labels": 0},
        {"input_ids": torch.tensor([2]), "labels": 0},
    )
    assert [[row.unit for row in one.rows] for one in made(rows, micro_batch_size=9).micro_batches] == [
        [0, 4],
        [1],
        [2],
        [3],
        [5],
    ]


def test_what_a_row_has_for_each_token_is_stretched_and_nothing_else():
    row = {
        "input_ids": torch.tensor([5, 6]),
        "attention_mask": [1, 1],
        "labels": [0.5, 0.25],  # Two labels of a row with two tokens.
        "weight": 0.5,
    }
    long = stretch_row(row, 3)
    assert long["input_ids"].tolist() == [5, 6, 5]
    assert long["attention_mask"] == [1, 1, 1]
    assert long["labels"] == [0.5, 0.25]


def test_collators_that_take_fields_out_do_not_change_the_data():
    rows = of_length(2, 3)

    def collate(some):
        return [row.pop("input_ids") for row in some]

    made(rows, collate=collate)
    assert lengths([row.row for row in rows]) == [2, 3]
