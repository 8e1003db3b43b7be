"""Scores of canaries are log-likelihood ratios, and use what is known of the other canaries."""

import math

import numpy as np
import pytest

from hf_dpzo.auditing.scores import Evidence, guess_coins, score_canaries


RNG = np.random.default_rng(3)


def simulate(canaries: int, *, rate: float = 1.0, steps: int = 60, directions: int = 4, noise: float = 1.0):
    """Return the evidence of a run, and its coins."""
    parts = RNG.normal(size=(canaries, steps, directions))
    parts /= np.linalg.norm(parts, axis=2, keepdims=True)
    coins = RNG.integers(0, 2, canaries).astype(bool)
    joined = (RNG.random((canaries, steps)) < rate) & coins[:, None]
    released = (parts * joined[:, :, None]).sum(axis=0) + noise * RNG.normal(size=(steps, directions))
    return Evidence(coefficients=parts, released=released, sampling_rate=rate, noise_variance=noise**2), coins


def share_ranked_right(scores: np.ndarray, coins: np.ndarray) -> float:
    """Return how often a canary that is in has a higher score than one that is out."""
    return float((scores[coins][:, None] > scores[~coins][None]).mean())


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_score_of_a_canary_alone_is_its_exact_log_likelihood_ratio(rate):
    evidence, _ = simulate(1, rate=rate)
    evidence = Evidence(**{**vars(evidence), "released": evidence.released / 10})  # So that there is only noise.
    [score] = score_canaries(evidence)
    exact = 0.0
    for part, seen in zip(evidence.coefficients[0], evidence.released, strict=True):
        likelier = math.exp(part @ seen - part @ part / 2)
        exact += math.log(1 - rate + rate * likelier)
    assert score == pytest.approx(exact, rel=1e-6)


def test_scores_tell_canaries_apart_that_plain_products_mix_up():
    """With many canaries and little noise, what the others add hides each one, unless it is estimated too."""
    evidence, coins = simulate(100, noise=0.5)
    plain = (evidence.coefficients * evidence.released).sum(axis=(1, 2))
    assert share_ranked_right(score_canaries(evidence), coins) > 0.98
    assert share_ranked_right(plain, coins) < 0.95


def test_scores_are_calibrated_as_log_odds():
    """Of canaries with odds of three to one or more, a fair share is in."""
    shown = [(score, coin) for _ in range(40) for score, coin in zip(*score_pairs(), strict=True)]
    scores, coins = map(np.array, zip(*shown, strict=True))
    for low, high in ((1.0, 1.5), (-1.5, -1.0)):
        between = (scores > low) & (scores < high)
        assert coins[between].mean() == pytest.approx(1 / (1 + math.exp(-(low + high) / 2)), abs=0.08)


def score_pairs():
    evidence, coins = simulate(50, rate=0.5, noise=2.0)
    return score_canaries(evidence), coins


def test_a_fixed_number_of_canaries_is_guessed_half_in_and_half_out():
    guessed = guess_coins(np.array([0.1, -3.0, 2.0, 0.1, 5.0, -1.0]), guesses=4)
    assert guessed.tolist() == [-1, 0, 1, -1, 1, 0]
    equal = guess_coins(np.zeros(10), guesses=4)
    assert (equal == 1).sum() == (equal == 0).sum() == 2


def test_the_canaries_part_of_a_sum_follows_from_the_coins():
    evidence, coins = simulate(6, rate=0.5)
    assert np.allclose(evidence.predict(coins), 0.5 * evidence.coefficients[coins].sum(axis=0))
