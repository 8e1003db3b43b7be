"""What an epsilon means in plain numbers, compared with exact values and with attackers that can be written down."""

import math

import pytest
from scipy import stats

from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.interpretation import CURVE_DELTAS, detection_rate, membership_accuracy, privacy_curve
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery


def gaussian(noise_multiplier: float, sampling_rate: float = 1.0, count: int = 1):
    return ((GaussianQuery(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate), count),)


def laplace(noise_multiplier: float, sampling_rate: float = 1.0, count: int = 1):
    return ((LaplaceQuery(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate), count),)


@pytest.mark.parametrize("noise", [0.5, 1.25, 5.0])
@pytest.mark.parametrize("false_alarms", [0.001, 0.01, 0.1])
def test_detection_rate_of_one_gaussian_release_is_that_of_the_best_test(noise, false_alarms):
    """The likelihood ratio test between N(0, s) and N(1, s): no other detects more (Neyman and Pearson)."""
    best = stats.norm.cdf(stats.norm.ppf(false_alarms) + 1 / noise)
    stated = detection_rate(gaussian(noise), delta=1e-5, false_alarms=false_alarms)
    assert best <= stated <= best + max(2e-3, 0.02 * best)


def test_detection_rates_of_wrong_noise_are_rejected():
    best = stats.norm.cdf(stats.norm.ppf(0.01) + 1 / 1.25)
    for wrong in (2 / 3, 3 / 2):
        assert abs(detection_rate(gaussian(1.25 * wrong), delta=1e-5) - best) > 0.01


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_detection_rate_of_one_laplace_release_is_that_of_a_threshold(noise):
    """For a shift by 1 and few alarms, a threshold detects exp(1 / b) times as many rows as it falsely accuses."""
    best = 0.01 * math.exp(1 / noise)
    assert best <= detection_rate(laplace(noise), delta=1e-5) <= best * 1.01


def test_sampling_and_fewer_steps_lower_the_detection_rate():
    rates = [detection_rate(gaussian(1.0, q, n), delta=1e-5) for q, n in ((0.01, 100), (0.01, 1000), (0.1, 1000))]
    assert 0.01 < rates[0] < rates[1] < rates[2] < 1


def test_detection_rate_is_no_more_than_epsilon_and_delta_allow():
    releases = gaussian(1.0, 0.05, 500)
    epsilon = account(releases, delta=1e-5).epsilon
    assert detection_rate(releases, delta=1e-5) <= 0.01 * math.exp(epsilon) + 1e-5


def test_zero_releases_leave_an_attacker_with_chance():
    assert detection_rate((), delta=1e-5) == 0.01
    assert membership_accuracy((), delta=1e-5) == 0.5


@pytest.mark.parametrize("releases", [((NonPrivateQuery(), 1),), gaussian(0.01, 1.0, 100)])
def test_without_protection_everything_is_detected(releases):
    assert detection_rate(releases, delta=1e-5) == 1.0
    assert membership_accuracy(releases, delta=1e-5) == pytest.approx(1.0)


def test_privacy_curve_falls_and_holds_the_stated_delta():
    curve = privacy_curve(gaussian(1.0, 0.01, 100), delta=3e-6)
    deltas, epsilons = zip(*curve, strict=True)
    assert set(deltas) == {*CURVE_DELTAS, 3e-6}
    assert list(deltas) == sorted(deltas, reverse=True) and list(epsilons) == sorted(epsilons)
    assert dict(curve)[3e-6] == account(gaussian(1.0, 0.01, 100), delta=3e-6).epsilon
