"""The audit of a run, on releases of its mechanism: it rarely finds more than is claimed, and less noise it finds."""

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import torch

from hf_dpzo.auditing.picture import draw_run_audit
from hf_dpzo.auditing.run_audit import audit_evidence, bound_noise
from hf_dpzo.auditing.scores import Evidence
from hf_dpzo.methods import DPZO, ZOSO, AggZO, PrivateMethod
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.clipping import SENSITIVITY


DELTA, STEPS, RATE, K = 1e-5, 400, 0.5, 4
SETTINGS = {"noise_multiplier": 12.0, "expected_batch_size": 8}
METHODS = {
    "joint": AggZO(num_directions=K, **SETTINGS),
    "separate": ZOSO(num_directions=K, **SETTINGS),
    "laplace": DPZO(noise="laplace", **SETTINGS),
}
RNG = np.random.default_rng(11)


def simulate(method: PrivateMethod, factor: float = 1.0, *, canaries: int = 24, others: int = 0):
    """Return evidence and coins of a run of `method` with `factor` times its noise, and some other rows."""
    directions = method.estimator.num_directions
    rows = torch.from_numpy(RNG.normal(size=(canaries + others, STEPS, directions)) * 100)
    parts = method.mechanism.clip_public(rows.reshape(-1, directions)).reshape(rows.shape)
    coins = RNG.integers(0, 2, canaries).astype(bool)
    present = np.append(coins, np.ones(others, dtype=bool))
    joined = (RNG.random((canaries + others, STEPS)) < RATE) & present[:, None]
    scale = factor * method.mechanism.noise_scale / SENSITIVITY
    draw = RNG.laplace if method is METHODS["laplace"] else RNG.normal
    released = (parts * joined[:, :, None]).sum(axis=0) + draw(scale=scale, size=(STEPS, directions))
    evidence = Evidence(
        coefficients=parts[:canaries], released=released, sampling_rate=RATE, noise_variance=(scale / factor) ** 2
    )
    return evidence, coins


def releases(method: PrivateMethod):
    return ((method.mechanism.query(RATE), STEPS),)


@cache
def claimed(name: str) -> float:
    return account(releases(METHODS[name]), delta=DELTA).epsilon


def audit(name: str, evidence: Evidence, coins: np.ndarray, confidence: float = 0.95):
    method = METHODS[name]
    settings = {"mechanism": method.mechanism, "releases": releases(method), "delta": DELTA}
    return audit_evidence(evidence, coins, **settings, confidence=confidence)


@pytest.mark.parametrize("name", METHODS)
def test_a_sound_mechanism_exceeds_its_claim_no_more_often_than_stated(name):
    """Without other rows, where the bound of the spread is as close as it can be. Each run exceeds it at most in 20."""
    found = [audit(name, *simulate(METHODS[name])) for _ in range(10)]
    assert sum(one.epsilon_lower > claimed(name) for one in found) <= 3  # More in one of a thousand tests.
    assert all(one.exceeds_claim or one.epsilon_lower <= one.epsilon_claimed for one in found)
    assert np.mean([one.epsilon_lower for one in found]) > 0.5 * claimed(name)


@pytest.mark.parametrize("name", METHODS)
def test_the_bound_on_the_noise_holds_as_often_as_stated(name):
    method = METHODS[name]
    bounds = [bound_noise(*simulate(method, canaries=2), method.mechanism, releases(method), 0.1) for _ in range(300)]
    too_low = sum(noise < 1 for noise, _ in bounds)
    assert 5 <= too_low <= 52  # 30 or a little fewer, for the two canaries add a little; more by chance.
    assert [noise < 1 for noise, _ in bounds] == [chance < 0.1 for _, chance in bounds]


@pytest.mark.parametrize("name", METHODS)
def test_two_thirds_of_the_noise_exceed_the_claim_and_three_halves_never_do(name):
    less = [audit(name, *simulate(METHODS[name], 2 / 3)) for _ in range(4)]
    assert all(one.exceeds_claim and one.epsilon_lower > claimed(name) for one in less)
    more = [audit(name, *simulate(METHODS[name], 3 / 2)) for _ in range(4)]
    assert not any(one.exceeds_claim or one.epsilon_lower > claimed(name) for one in more)


def test_half_of_the_noise_is_found_beside_other_rows_that_nobody_knows():
    found = [audit("joint", *simulate(METHODS["joint"], 1 / 2, others=16)) for _ in range(4)]
    assert all(one.exceeds_claim for one in found)
    unsuspicious = [audit("joint", *simulate(METHODS["joint"], others=16)) for _ in range(4)]
    assert not any(one.exceeds_claim for one in unsuspicious)


def test_guesses_alone_find_that_rows_are_not_clipped():
    """The spread does not: it is only larger. Canaries that add ten times their part are seen by everybody."""
    evidence, coins = simulate(METHODS["joint"], canaries=100)
    loud = dataclasses.replace(evidence, released=evidence.released + 9 * 2 * evidence.predict(coins))
    found = audit("joint", loud, coins)
    assert found.from_spread < claimed("joint") < found.from_guesses
    assert found.exceeds_claim


def test_more_confidence_proves_less():
    evidence, coins = simulate(METHODS["joint"])
    bounds = [audit("joint", evidence, coins, confidence).epsilon_lower for confidence in (0.5, 0.95, 0.999)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[2]


def test_what_is_published_tells_no_coin():
    found = audit("joint", *simulate(METHODS["joint"]))
    shown = found.as_json()
    assert json.loads(json.dumps(shown)) == shown
    assert {"coins", "scores"} & set(shown) == set()
    assert shown["epsilon_lower"] <= found.epsilon_lower < shown["epsilon_lower"] + 1e-3


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = audit("joint", *simulate(METHODS["joint"]))
    for name in ("audit.png", "audit.svg"):
        draw_run_audit(found, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
