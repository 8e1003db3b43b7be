"""Poisson batches, and what a logical batch is made of."""

import numpy as np
import pytest
import torch

from hf_dpzo.sampling import LogicalBatchCollator, PoissonBatchSampler, steps_per_epoch


def batches(size, rate, count):
    sampler = PoissonBatchSampler(size=size, sampling_rate=rate)
    drawn = []
    while len(drawn) < count:
        drawn += list(sampler)
    return drawn[:count]


def test_batch_sizes_are_binomial():
    sizes = np.array([len(batch) for batch in batches(1000, 0.05, 2000)])
    assert abs(sizes.mean() - 50) < 5 * np.sqrt(47.5 / 2000)
    assert abs(sizes.var() - 47.5) < 5 * 47.5 * np.sqrt(2 / 2000)


def test_every_row_is_drawn_equally_often_and_pairs_independently():
    member = np.zeros((4000, 10))
    for row, batch in enumerate(batches(10, 0.3, 4000)):
        member[row, batch] = 1
    assert np.abs(member.mean(axis=0) - 0.3).max() < 5 * np.sqrt(0.21 / 4000)
    correlations = np.corrcoef(member.T) - np.eye(10)
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


def test_no_row_is_drawn_twice_in_a_batch():
    assert all(len(set(batch)) == len(batch) for batch in batches(20, 0.9, 50))


def test_empty_batches_are_yielded():
    assert [] in batches(2, 0.05, 200)


def test_two_passes_differ_whatever_is_seeded():
    sampler = PoissonBatchSampler(size=200, sampling_rate=0.2)
    passes = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        passes.append(list(sampler))
    assert passes[0] != passes[1]


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (0.5, 2), (0.3, 3), (0.9, 1)])
def test_an_epoch_uses_each_row_once_on_average(rate, steps):
    assert steps_per_epoch(rate) == steps == len(PoissonBatchSampler(size=10, sampling_rate=rate))


def test_logical_batch_is_cut_into_micro_batches_in_order_of_length():
    rows = [{"input_ids": [0] * length} for length in (5, 1, 4, 2, 3)]
    item = LogicalBatchCollator(lambda part: [len(row["input_ids"]) for row in part], micro_batch_size=2)(rows)
    parts = [{"rows": 2, "inputs": [1, 2]}, {"rows": 2, "inputs": [3, 4]}, {"rows": 1, "inputs": [5]}]
    assert item == {"micro_batches": parts}


def test_empty_batch_has_no_micro_batches():
    assert LogicalBatchCollator(list, micro_batch_size=2)([]) == {"micro_batches": []}


def test_rows_without_tokens_keep_their_order():
    (part,) = LogicalBatchCollator(list, micro_batch_size=3)([3, 1, 2])["micro_batches"]
    assert part == {"rows": 3, "inputs": [3, 1, 2]}
