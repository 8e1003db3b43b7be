"""What a logical batch is made of."""

import pytest
import torch

from hf_dpzo.collation import LogicalBatchCollator, stretched
from hf_dpzo.sampling import Fetched


def lengths(rows):
    return [len(row["input_ids"]) for row in rows]


def fetched(*rows):
    return [Fetched(unit=unit, row=row) for unit, row in enumerate(rows)]


def of_length(*sizes):
    return fetched(*({"input_ids": [7] * size} for size in sizes))


def made(rows, **options):
    return LogicalBatchCollator(**{"collate": lengths, "micro_batch_size": 2, **options})(rows)["batch"]


def test_rows_are_cut_into_micro_batches_in_order_of_length():
    batch = made(of_length(5, 1, 4, 2, 3))
    assert [one.inputs for one in batch.micro_batches] == [[1, 2], [3, 4], [5]]
    assert [one.size for one in batch.micro_batches] == [2, 2, 1]
    assert batch.units == [1, 3, 4, 2, 0]
    assert batch.num_units == 5


def test_empty_batch_has_no_micro_batches():
    assert (made([]).micro_batches, made([]).num_units, made([]).units) == ((), 0, [])


def test_rows_without_tokens_keep_their_order():
    assert made(fetched(3, 1, 2), collate=list, micro_batch_size=3).micro_batches[0].inputs == [3, 1, 2]


@pytest.mark.parametrize("sizes", [(1,), (3, 3), (1, 2, 3, 4, 5, 6, 7, 8), (8, 8, 8, 8), (4,) * 9])
def test_padded_micro_batches_have_public_shapes_alone(sizes):
    """Full, and with a row of the padded length in each, to which any collator pads."""
    batch = made(of_length(*sizes), padded_lengths=(4, 8), micro_batch_size=3)
    shapes = {(one.size, len(one.inputs), max(one.inputs)) for one in batch.micro_batches}
    assert shapes <= {(3, 3, 4), (3, 3, 8)}
    assert sorted(batch.units) == list(range(len(sizes)))


def test_rows_longer_than_all_padded_lengths_are_left_out():
    batch = made(of_length(2, 9, 3), padded_lengths=(4, 8))
    assert sorted(batch.units) == [0, 2]
    assert batch.num_units == 3


def test_rows_that_could_not_be_fetched_are_left_out():
    batch = made(fetched({"input_ids": [1]}, None, {"input_ids": [1, 2]}))
    assert (batch.units, batch.num_units) == ([0, 2], 3)


def test_where_one_row_can_not_be_collated_the_others_are_collated_one_by_one():
    def collate(rows):
        if any(9 in row["input_ids"] for row in rows):
            raise KeyError(9)
        return lengths(rows)

    batch = made(fetched({"input_ids": [1]}, {"input_ids": [9]}, {"input_ids": [2]}), collate=collate)
    assert [one.inputs for one in batch.micro_batches] == [[1], None, [1]]
    padded = made(fetched({"input_ids": [1]}, {"input_ids": [9]}), collate=collate, padded_lengths=(4,))
    assert [one.inputs for one in padded.micro_batches] == [[1, 4], None] or padded.micro_batches


def test_rows_taken_apart_keep_the_public_shape():
    collator = LogicalBatchCollator(collate=lengths, micro_batch_size=4, padded_lengths=(8,))
    (one,) = collator(of_length(3, 5, 2))["batch"].micro_batches
    assert [part.inputs for part in collator.apart(one)] == [[2, 8, 8, 8], [3, 8, 8, 8], [5, 8, 8, 8]]


def test_what_a_row_has_for_each_token_is_stretched_and_nothing_else():
    row = {
        "input_ids": torch.tensor([5, 6]),
        "attention_mask": [1, 1],
        "labels": [0.5, 0.25],  # Two labels of a row with two tokens.
        "weight": 0.5,
    }
    long = stretched(row, 3)
    assert long["input_ids"].tolist() == [5, 6, 5]
    assert long["attention_mask"] == [1, 1, 1]
    assert long["labels"] == [0.5, 0.25]


def test_collators_that_take_fields_out_do_not_change_the_data():
    rows = of_length(2, 3)

    def collate(some):
        return [row.pop("input_ids") for row in some]

    made(rows, collate=collate)
    assert lengths([row.row for row in rows]) == [2, 3]
