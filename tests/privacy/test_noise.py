"""Secret randomness: exact in distribution, and determined by nothing that an attacker could know."""

import ast
import inspect

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dpzo.privacy import noise
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian, DiscreteLaplace


def draws(scale: int, count: int) -> np.ndarray:
    return np.array(DiscreteGaussian(scale=scale).add([0] * count), dtype=float)


@pytest.mark.parametrize("scale", [1 << 10, 1 << 40, 3 << 41])
def test_noise_has_the_stated_scale_and_no_other(scale):
    standard = draws(scale, 4000) / scale
    assert stats.kstest(standard, "norm").pvalue > 1e-7
    assert stats.kstest(standard, "norm", args=(0, 2 / 3)).pvalue < 1e-9
    assert stats.kstest(standard, "norm", args=(0, 3 / 2)).pvalue < 1e-9


def test_noise_of_scale_one_follows_the_discrete_gaussian():
    """At scale 1 the lattice shows: compare with the exact probabilities, proportional to exp(-x**2 / 2)."""
    values = draws(1, 20000)
    support = np.arange(-3, 4)
    weights = np.exp(-(support**2) / 2)
    expected = weights / np.exp(-(np.arange(-30, 31) ** 2) / 2).sum()
    observed = np.array([(values == value).sum() for value in support])
    rest = len(values) - observed.sum()
    both = np.append(observed, rest), np.append(expected, 1 - expected.sum()) * len(values)
    assert stats.chisquare(*both).pvalue > 1e-7


def test_noise_keeps_large_values_exact():
    value = (1 << 61) + 1
    noisy = DiscreteGaussian(scale=1).add([value])[0]
    assert isinstance(noisy, int)
    assert abs(noisy - value) < 20


def test_no_seed_reaches_the_noise():
    def seeded() -> list[int]:
        torch.manual_seed(1)
        np.random.seed(1)
        return DiscreteGaussian(scale=1 << 40).add([0] * 8)

    assert seeded() != seeded()


def test_no_seed_reaches_the_choice_of_rows():
    def seeded() -> bytes:
        torch.manual_seed(1)
        np.random.seed(1)
        return BernoulliSampler(size=400, rate=0.5).draw().tobytes()

    assert seeded() != seeded()


def test_draws_for_several_directions_are_independent():
    pairs = np.array([DiscreteGaussian(scale=1 << 40).add([0, 0]) for _ in range(2000)], dtype=float)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1
    assert abs(np.corrcoef(pairs[1:, 0], pairs[:-1, 0])[0, 1]) < 0.1


def test_noise_does_not_correlate_with_draws_from_public_seeds():
    noises = draws(1 << 40, 2000)
    public = [torch.randn(1, generator=torch.Generator().manual_seed(seed)).item() for seed in range(2000)]
    assert abs(np.corrcoef(noises, public)[0, 1]) < 0.1


def test_noise_module_takes_no_seed():
    names = {node.arg for node in ast.walk(ast.parse(inspect.getsource(noise))) if isinstance(node, ast.arg)}
    assert not {name for name in names if "seed" in name or "generator" in name or "state" in name}


@pytest.mark.parametrize("scale", [0, -1, 2**53])
def test_invalid_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale={scale}"):
        DiscreteGaussian(scale=scale)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_rows_are_drawn_at_the_sampling_rate(rate):
    taken = sum(BernoulliSampler(size=50_000, rate=rate).draw().sum() for _ in range(4))
    assert abs(taken - 200_000 * rate) <= 5 * np.sqrt(200_000 * rate * (1 - rate)) + 1e-9


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_invalid_rate_is_refused(rate):
    with pytest.raises(ValueError, match="rate="):
        BernoulliSampler(size=3, rate=rate)


@pytest.mark.parametrize("scale", [1 << 10, 1 << 40, 3 << 41])
def test_laplace_noise_has_the_stated_scale_and_no_other(scale):
    standard = np.array(DiscreteLaplace(scale=scale).add([0] * 4000), dtype=float) / scale
    assert stats.kstest(standard, "laplace").pvalue > 1e-7
    assert stats.kstest(standard, "laplace", args=(0, 2 / 3)).pvalue < 1e-9
    assert stats.kstest(standard, "laplace", args=(0, 3 / 2)).pvalue < 1e-9


def test_laplace_noise_of_scale_one_follows_the_discrete_laplace():
    """At scale 1 the lattice shows: probabilities proportional to exp(-|x|)."""
    values = np.array(DiscreteLaplace(scale=1).add([0] * 20000))
    support = np.arange(-4, 5)
    expected = np.exp(-np.abs(support)) * (1 - np.exp(-1)) / (1 + np.exp(-1))
    observed = np.array([(values == value).sum() for value in support])
    both = np.append(observed, len(values) - observed.sum()), np.append(expected, 1 - expected.sum()) * len(values)
    assert stats.chisquare(*both).pvalue > 1e-7


@pytest.mark.parametrize("kind", [DiscreteGaussian, DiscreteLaplace])
@pytest.mark.parametrize("scale", [0, -1, 2**53])
def test_scales_that_are_not_positive_and_exact_in_float64_are_refused(kind, scale):
    with pytest.raises(ValueError, match=f"scale={scale}: the noise needs an integer scale"):
        kind(scale=scale)
