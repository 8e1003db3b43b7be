"""Rows are cut into micro-batches so that a row more or less moves few others to other micro-batches."""

from collections import Counter

import numpy as np
import pytest
import torch

from hf_dpzo.data.cutting import cut_into_micro_batches, digest_content
from hf_dpzo.data.sampling import KEY_BITS, FetchedRow, PoissonBatchSampler
from hf_dpzo.data.units import Units


LENGTHS = {
    "many": lambda random: int(random.integers(1, 300)),
    "few": lambda random: int(random.integers(5, 8)),
    "one": lambda random: 9,
    "skewed": lambda random: int(random.geometric(0.02)),
}


def draw_row(random, length, *, slot, repeated=False):
    tokens = [5] * length if repeated else random.integers(0, 99, length).tolist()
    key = int(random.integers(0, 2**KEY_BITS, dtype=np.int64))
    return FetchedRow(unit=slot, row={"input_ids": tokens}, slot=slot, key=key)


def neighbourhoods(rows, size):
    """Return, for each row, the rows with which it shares a micro-batch."""
    parts = [frozenset(row.slot for row in part) for part in cut_into_micro_batches(rows, size)]
    assert sorted(slot for part in parts for slot in part) == sorted(row.slot for row in rows)
    assert all(1 <= len(part) <= size for part in parts)
    return {slot: part for part in parts for slot in part}


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_row_more_moves_at_most_one_micro_batch_of_others(lengths, size, repeated):
    random = np.random.default_rng(0)
    reached = Counter()
    for count in [*range(20), 64, 65, 200]:
        for _ in range(4):
            rows = [draw_row(random, LENGTHS[lengths](random), slot=slot, repeated=repeated) for slot in range(count)]
            another = draw_row(random, LENGTHS[lengths](random), slot=10_000, repeated=repeated)
            without = neighbourhoods(rows, size)
            place = int(random.integers(0, count + 1))
            beside = neighbourhoods([*rows[:place], another, *rows[place:]], size)
            reached[sum(beside[slot] != without[slot] for slot in without)] += 1
    assert max(reached) <= (size if size > 1 else 0)
    assert len(reached) > 1 or size == 1


def test_rows_that_are_filled_in_one_after_the_other_would_all_move():
    """What the cut replaces: one short row more moves every later one."""
    random = np.random.default_rng(0)
    rows = [draw_row(random, 10 + slot, slot=slot) for slot in range(64)]

    def fill(some):
        ordered = sorted(some, key=lambda row: len(row.row["input_ids"]))
        parts = [frozenset(row.slot for row in ordered[start : start + 8]) for start in range(0, len(ordered), 8)]
        return {slot: part for part in parts for slot in part}

    one_more = [*rows, draw_row(random, 2, slot=10_000)]
    assert sum(fill(one_more)[slot] != fill(rows)[slot] for slot in range(64)) == 64
    assert sum(neighbourhoods(one_more, 8)[slot] != neighbourhoods(rows, 8)[slot] for slot in range(64)) <= 8


def test_rows_of_equal_numbers_are_still_cut():
    rows = [FetchedRow(unit=0, row={"input_ids": [5]}, slot=slot) for slot in range(7)]
    assert [[row.slot for row in part] for part in cut_into_micro_batches(rows, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(cut_into_micro_batches([], 3)) == []


def test_a_row_is_placed_by_what_it_holds_and_a_key_of_its_own_alone():
    """So rows of equal content are told apart by the key, and no row's place tells where it is in the data."""
    rows = [FetchedRow(unit=0, row={"input_ids": [5]}, slot=slot, key=slot << KEY_BITS - 3) for slot in range(8)]
    parts = {frozenset(row.slot for row in part) for part in cut_into_micro_batches(rows[::-1], 2)}
    assert parts == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5}), frozenset({6, 7})}


def test_keys_are_fresh_in_each_batch():
    sampler = PoissonBatchSampler(units=Units(num_rows=400), sampling_rate=1.0)
    first, second = ([row.key for row in next(iter(sampler))] for _ in range(2))
    assert len({*first, *second}) == 800
    assert all(0 <= key < 2**KEY_BITS for key in first)
    assert 140 < sum(key >> KEY_BITS - 1 for key in first) < 260  # Six standard deviations.


class Noisy:
    def __repr__(self):
        raise SystemExit("a user's code ran")

    __len__ = __hash__ = __iter__ = __reduce__ = __repr__


def test_the_digest_follows_from_the_content_and_runs_no_code_of_users():
    contents = [
        {"input_ids": [5, 6], "labels": 1},
        {"input_ids": [5, 6], "labels": 1.0},
        {"input_ids": [5, 6], "labels": True},
        {"input_ids": (5, 6), "labels": 1},
        {"input_ids": [6, 5], "labels": 1},
        {"input_ids": [5, 6]},
        {"input_ids": torch.tensor([5, 6])},
        {"input_ids": torch.tensor([5, 7])},
        {"input_ids": torch.tensor([5.0, 6.0], dtype=torch.bfloat16)},
        {"input_ids": np.array([5, 6])},
        {"spans": [[0, 1], [2]]},
        {"spans": [[0], [1, 2]]},
        [1, "2"],
        "text",
        None,
    ]
    digests = [digest_content(content) for content in contents]
    assert digests == [digest_content(content) for content in contents]
    assert len(set(digests)) == len(contents)
    assert digest_content({"a": Noisy()}) == digest_content({"a": Noisy()})
    for odd in (10**5000, np.array([Noisy()], dtype=object), torch.eye(2).to_sparse(), [[]] * 3, {Noisy: 1}, "\ud800"):
        assert 0 <= digest_content(odd) < 2**64
