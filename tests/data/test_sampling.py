"""Poisson batches: which rows are drawn for them."""

import numpy as np
import pytest
import torch

from hf_dpzo.data.sampling import PoissonBatchSampler, steps_per_epoch
from hf_dpzo.data.units import Units


def batches(size, rate, count):
    sampler = PoissonBatchSampler(units=Units(num_rows=size), sampling_rate=rate)
    drawn = []
    while len(drawn) < count:
        drawn += [[fetched.row for fetched in batch] for batch in sampler]
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


def test_two_passes_differ_even_with_the_same_seeds():
    sampler = PoissonBatchSampler(units=Units(num_rows=200), sampling_rate=0.2)
    passes = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        passes.append(list(sampler))
    assert passes[0] != passes[1]


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (0.5, 2), (0.3, 3), (0.9, 1)])
def test_an_epoch_uses_each_row_once_on_average(rate, steps):
    assert steps_per_epoch(rate) == steps == len(PoissonBatchSampler(units=Units(num_rows=10), sampling_rate=rate))
