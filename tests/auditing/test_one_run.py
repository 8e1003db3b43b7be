"""What guesses prove: no more than the promise allows, even where it is kept as narrowly as it can be."""

import math

import numpy as np
import pytest
from scipy import special, stats

from hf_dpzo.auditing.one_run import Promise, find_threshold
from hf_dpzo.privacy.queries import GaussianQuery


CANARIES = 200
RNG = np.random.default_rng(5)


def pure(epsilon: float) -> Promise:
    return Promise(pairs=((0.0, epsilon),))


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("guesses", [20, 100])
def test_randomized_response_is_never_rejected_more_often_than_stated(epsilon, guesses):
    """Its answers are right independently, as often as pure epsilon allows: the bound is met, and never undercut."""
    share = special.expit(epsilon)
    for correct in range(guesses // 2, guesses + 1):
        chance = pure(epsilon).chance(canaries=CANARIES, guesses=guesses, correct=correct)
        exact = stats.binom.sf(correct - 1, guesses, share)
        assert exact * (1 - 1e-9) <= chance <= 1.02 * exact


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.01), (1.0, 0.02), (0.5, 1e-4)])
def test_a_mechanism_that_tells_all_with_probability_delta_is_not_rejected(epsilon, delta):
    guesses, share = 30, special.expit(epsilon)
    promise = Promise(pairs=((delta, epsilon),))
    for correct in range(15, guesses + 1):
        exact = delta + (1 - delta) * stats.binom.sf(correct - 1, guesses, share)
        assert promise.chance(canaries=guesses, guesses=guesses, correct=correct) >= exact


@pytest.mark.parametrize("mu", [0.5, 1.5])
def test_gaussian_noise_on_each_coin_alone_is_not_rejected(mu):
    promise = Promise.of_releases(((GaussianQuery(noise_multiplier=1 / mu, sampling_rate=1.0), 1),), delta=1e-5)
    assert rejected(promise, mu, runs=200) <= 14  # Each with probability 0.05 at most: 22 would be rare.


def test_gaussian_noise_of_two_thirds_and_of_half_the_scale_is_rejected():
    """The guesses are those of the best attacker: with less noise than is promised, they are right too often."""
    promise = Promise.of_releases(((GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1),), delta=1e-5)
    assert rejected(promise, 2.0, runs=20, canaries=1000, guesses=250) == 20
    assert rejected(promise, 1.5, runs=20, canaries=20_000, guesses=2000) == 20
    assert rejected(promise, 2 / 3, runs=20, canaries=20_000, guesses=2000) == 0


def rejected(promise: Promise, mu: float, *, runs: int, canaries: int = CANARIES, guesses: int = 100) -> int:
    """Of so many runs in which each coin is told with Gaussian noise, how many are rejected at 5 %."""
    count = 0
    for _ in range(runs):
        coins = RNG.integers(0, 2, canaries)
        seen = mu * (coins - 0.5) + RNG.normal(size=canaries)
        best = np.argsort(-abs(seen))[:guesses]
        correct = int(((seen > 0) == coins)[best].sum())
        count += promise.chance(canaries=canaries, guesses=guesses, correct=correct) <= 0.05
    return count


def test_more_right_guesses_and_stronger_promises_have_less_chance():
    counts = {"canaries": CANARIES, "guesses": 50}
    by_correct = [pure(1.0).chance(**counts, correct=correct) for correct in range(51)]
    assert by_correct == sorted(by_correct, reverse=True)
    assert by_correct[0] == 1.0
    by_epsilon = [pure(epsilon).chance(**counts, correct=48) for epsilon in (0.1, 1.0, 2.0, 4.0, 50.0, 800.0)]
    assert by_epsilon == sorted(by_epsilon)
    assert by_epsilon[-1] == 1.0


def test_several_pairs_prove_more_than_each_of_them():
    curve = Promise.of_releases(((GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1),), delta=1e-5)
    counts = {"canaries": 1000, "guesses": 250, "correct": 245}
    alone = [Promise(pairs=(pair,)).chance(**counts) for pair in curve.pairs]
    assert curve.chance(**counts) < 0.5 * min(alone)


def test_a_threshold_is_found_from_the_rejected_side():
    assert find_threshold(lambda value: value < 3.0, low=0.1, high=100.0) == pytest.approx(3.0, rel=2e-3)
    assert find_threshold(lambda value: value < 3.0, low=0.1, high=100.0) < 3.0
    assert find_threshold(lambda value: False, low=0.1, high=1.0) == 0.1
    assert find_threshold(lambda value: True, low=0.1, high=1.0) == 1.0
    assert math.isfinite(pure(0.0).chance(canaries=2, guesses=2, correct=2))
