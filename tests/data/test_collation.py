"""How rows are collated into the micro-batches of a logical batch."""

from collections import UserDict

import pytest
import torch

from hf_dpzo.data.collation import LogicalBatchCollator, get_row_signature
from hf_dpzo.data.filler import stretch_row
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.models.activation import locate_invocation


def lengths(rows):
    return [len(row["input_ids"]) for row in rows]


def fetched(*rows):
    return [FetchedRow(unit=unit, row=row, slot=unit) for unit, row in enumerate(rows)]


def of_length(*sizes):
    return fetched(*({"input_ids": [7] * size} for size in sizes))


def padded(rows):
    """Collate rows, padded to the longest of them."""
    width = max(lengths(rows))
    return {"input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])}


def build_batch(rows, **options):
    return LogicalBatchCollator(**{"collate": lengths, "micro_batch_size": 2, **options})(rows)["batch"]


def test_rows_are_cut_into_micro_batches_in_order_of_length():
    batch = build_batch(of_length(5, 1, 4, 2, 3))
    assert [micro_batch.inputs for micro_batch in batch.micro_batches] == [[1], [2, 3], [4, 5]]
    assert [micro_batch.size for micro_batch in batch.micro_batches] == [1, 2, 2]
    assert batch.row_units == [1, 3, 4, 2, 0]
    assert batch.num_units == 5


def test_empty_batch_has_no_micro_batches():
    assert (build_batch([]).micro_batches, build_batch([]).num_units, build_batch([]).row_units) == ((), 0, [])


def test_rows_without_tokens_keep_their_order():
    assert build_batch(fetched(3, 1, 2), collate=list, micro_batch_size=3).micro_batches[0].inputs == [3, 1, 2]


@pytest.mark.parametrize("sizes", [(1,), (3, 3), (1, 2, 3, 4, 5, 6, 7, 8), (8, 8, 8, 8), (4,) * 9])
def test_padded_micro_batches_have_only_public_shapes(sizes):
    """Each is full and holds a row of the padded length, to which any collator pads."""
    batch = build_batch(of_length(*sizes), collate=padded, padded_lengths=(4, 8), micro_batch_size=3)
    assert {tuple(micro_batch.inputs["input_ids"].shape) for micro_batch in batch.micro_batches} <= {(3, 4), (3, 8)}
    assert all(micro_batch.size == 3 for micro_batch in batch.micro_batches)
    assert sorted(batch.row_units) == list(range(len(sizes)))


def test_rows_longer_than_all_padded_lengths_are_left_out():
    batch = build_batch(of_length(2, 9, 3), padded_lengths=(4, 8))
    assert sorted(batch.row_units) == [0, 2]
    assert batch.num_units == 3


def test_rows_that_could_not_be_fetched_are_left_out():
    batch = build_batch(fetched({"input_ids": [1]}, None, {"input_ids": [1, 2]}))
    assert (batch.row_units, batch.num_units) == ([0, 2], 3)


def test_rows_beside_one_that_cannot_be_collated_are_collated_one_by_one():
    def collate(rows):
        if any(9 in row["input_ids"] for row in rows):
            raise KeyError(9)
        return lengths(rows)

    rows = fetched({"input_ids": [1]}, {"input_ids": [9]}, {"input_ids": [2]})
    batch = build_batch(rows, collate=collate, micro_batch_size=3)
    assert [micro_batch.inputs for micro_batch in batch.micro_batches] == [[1], None, [1]]


def test_a_micro_batch_split_into_rows_keeps_its_public_shape():
    collator = LogicalBatchCollator(collate=padded, micro_batch_size=4, padded_lengths=(8,))
    (whole,) = collator(of_length(3, 5, 2))["batch"].micro_batches
    parts = collator.split_into_rows(whole)
    assert [tuple(part.inputs["input_ids"].shape) for part in parts] == [(4, 8)] * 3
    assert [[row.unit for row in part.rows] for part in parts] == [[2], [0], [1]]


def test_a_collator_that_does_not_pad_to_the_longest_row_yields_no_inputs():
    def cutting(rows):
        return {"input_ids": torch.zeros(len(rows), 3)}

    assert build_batch(of_length(2, 3), collate=cutting, padded_lengths=(8,)).micro_batches[0].inputs is None


def test_rows_with_different_fields_or_types_are_in_separate_micro_batches():
    rows = fetched(
        {"input_ids": [1], "labels": 1},
        {"input_ids": [1], "labels": None},
        {"input_ids": [1]},
        {"input_ids": [1], "labels": 0.5},
        {"input_ids": [2], "labels": 0},
        {"input_ids": torch.tensor([2]), "labels": 0},
    )
    assert [
        [row.unit for row in micro_batch.rows] for micro_batch in build_batch(rows, micro_batch_size=9).micro_batches
    ] == [
        [0, 4],
        [1],
        [2],
        [3],
        [5],
    ]


def test_stretching_a_row_changes_only_its_fields_of_one_value_per_token():
    row = {
        "input_ids": torch.tensor([5, 6]),
        "attention_mask": [1, 1],
        "labels": [0.5, 0.25],  # Two labels of a row with two tokens.
        "weight": 0.5,
    }
    stretched = stretch_row(row, 3)
    assert stretched["input_ids"].tolist() == [5, 5, 6]
    assert stretched["attention_mask"] == [1, 1, 1]
    assert stretched["labels"] == [0.5, 0.25]


@pytest.mark.parametrize("convert", [list, torch.tensor])
def test_a_filler_has_one_target_where_rows_need_not_have_more(convert):
    """Each costs a product with all words. Labels of a row that ignores none may mean something else."""
    for labels, expected in {
        (-100, 6, 7, -100): [-100, -100, -100, -100, 7, -100],
        (5, 6, 7, 8): [5, 5, 5, 6, 7, 8],
        (-100, -100, -100, -100): [-100] * 6,
    }.items():
        row = {"input_ids": convert([5, 6, 7, 8]), "labels": convert(list(labels))}
        stretched = stretch_row(row, 6)["labels"]
        assert type(stretched) is type(row["labels"])
        assert list(map(int, stretched)) == expected
    assert stretch_row({"input_ids": [5, 6], "labels": [-100, 7]}, 4, written_fields=["labels"])["labels"] == [
        -100
    ] * 3 + [7]


def test_collators_that_remove_fields_do_not_change_the_data():
    rows = of_length(2, 3)

    def collate(batch):
        return [row.pop("input_ids") for row in batch]

    build_batch(rows, collate=collate)
    assert lengths([row.row for row in rows]) == [2, 3]


def test_rows_share_a_micro_batch_only_if_their_types_are_the_same_and_not_just_their_names():
    """A collator may take what it does with all rows from the first one's types."""

    def number(base):
        return type("Number", (base,), {})

    one, other = number(int), number(float)
    rows = [{"labels": one(1)}, {"labels": other(1)}]
    rows += [{"labels": [one(1)]}, {"labels": [other(1)]}, UserDict(labels=1), UserDict(labels=1.5), UserDict(other=1)]
    assert len({get_row_signature(row) for row in rows}) == len(rows)
    assert get_row_signature(UserDict(labels=1)) == get_row_signature(UserDict(labels=2))


@pytest.mark.parametrize("tokens", [[5, 6, 9], [5, 5, 9], [9, 5, 6, 5, 6, 8]])
def test_a_stretched_row_is_activated_where_it_was(tokens):
    row = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
    for invocation in ([5, 6], [5, 5], [5]):
        before = locate_invocation(torch.tensor([tokens]), invocation) - len(tokens)
        stretched = locate_invocation(torch.tensor([stretch_row(row, 12)["input_ids"]]), invocation) - 12
        assert stretched == before or before == -len(tokens) - 1


@pytest.mark.parametrize("convert", [list, torch.tensor])
def test_a_stretched_row_keeps_the_beginning_that_rows_share(convert):
    row = {"input_ids": convert([5, 6, 7, 8])}
    for kept, expected in {0: [5, 5, 5, 6, 7, 8], 2: [5, 6, 6, 6, 7, 8], 9: [5, 6, 7, 8, 8, 8]}.items():
        assert list(map(int, stretch_row(row, 6, kept=kept)["input_ids"])) == expected


def test_all_rows_of_a_public_shape_begin_as_the_drawn_ones_do():
    seen = []
    collator = LogicalBatchCollator(
        collate=lambda rows: seen.extend(rows) or {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        micro_batch_size=3,
        padded_lengths=(6,),
        beginning_length=2,
    )
    collator([FetchedRow(unit=0, row={"input_ids": [5, 6, 7]}, slot=0)])
    assert [row["input_ids"][:2] for row in seen] == [[5, 6]] * 3
