"""The noises of a coefficient, by simulation of the mechanism that they are computed for."""

import math

import numpy as np
import pytest
import torch

from hf_dpzo.methods import DPZO, ZOSO, AggZO, DPZero
from hf_dpzo.privacy.limits import RunLimits, list_equal_times


METHODS = {
    "dpzero": DPZero(noise_multiplier=0.8, expected_batch_size=16, clip_norm=1.5),
    "aggzo": AggZO(noise_multiplier=0.8, expected_batch_size=16, clip_norm=0.4, num_directions=16),
    "zoso": ZOSO(noise_multiplier=0.8, expected_batch_size=16, clip_norm=1.5, num_directions=4),
    "laplace": DPZO(noise_multiplier=0.8, expected_batch_size=16, clip_norm=0.05, noise="laplace", smoothing=1e-2),
}


def limits_of(method, quotients, *, rate=0.02, steps=100) -> RunLimits:
    count = method.estimator.num_directions
    return RunLimits.of_public(quotients, method.mechanism, num_directions=count, sampling_rate=rate, steps=steps)


@pytest.fixture(scope="module")
def quotients() -> torch.Tensor:
    return torch.randn(800, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
def test_both_noises_are_those_of_the_releases(quotients, name):
    method = METHODS[name]
    count = method.estimator.num_directions
    found = limits_of(method, quotients, rate=16 / 800)
    rows = quotients[:, :count] / count
    added = method.mechanism.clip_public(rows)
    draw = np.random.Generator(np.random.Philox(key=1))
    sums = np.array([added[draw.random(800) < 16 / 800].sum(axis=0) / 16 for _ in range(1500)])
    assert found.sampling == pytest.approx(sums.std(axis=0).mean(), rel=0.1)
    empty = torch.zeros(0, count, dtype=torch.float64)
    units = method.mechanism.clip_norm
    noise = np.array([method.mechanism.release(empty).coefficients for _ in range(1500)]) / units
    assert found.privacy == pytest.approx(noise.std(), rel=0.1)


def test_a_full_batch_is_sampled_without_noise(quotients):
    assert limits_of(METHODS["dpzero"], quotients, rate=1.0).ratio == 0


def test_the_share_of_clipped_rows_and_the_spread_are_those_of_what_is_clipped(quotients):
    joint = limits_of(METHODS["aggzo"], quotients)
    norms = (quotients / 16).norm(dim=1)
    assert joint.clipped == pytest.approx(float((norms > 0.4).double().mean()))
    assert joint.spread == pytest.approx(float(norms.square().mean().sqrt()) / 0.4)
    separate = limits_of(METHODS["zoso"], quotients[:, :4])
    assert separate.clipped == pytest.approx(float((quotients[:, :4].abs() > 1.5).any(dim=1).double().mean()))
    assert separate.spread == pytest.approx(float(quotients[:, :4].square().mean().sqrt()) / 1.5)


def test_rows_along_few_directions_stand_for_rows_along_many():
    quotients = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert limits_of(METHODS["aggzo"], quotients).spread == pytest.approx(math.sqrt(12.5) / 4 / 0.4)
    assert limits_of(METHODS["dpzero"], quotients).clipped == 1


@pytest.mark.parametrize(
    ("clip_norm", "size", "steps", "attention"),
    [
        (1.0, 8, 150, True),  # Few rows, one direction, few steps.
        (1.0, 64, 5000, False),  # As much noise of sampling for each of it, but many coefficients in all.
        (10.0, 64, 5000, True),  # Ten spreads.
        (0.1, 64, 5000, False),
        (0.01, 64, 5000, True),  # Nothing but signs.
    ],
)
def test_attention_is_asked_for_where_something_can_be_done(quotients, clip_norm, size, steps, attention):
    method = DPZero(noise_multiplier=0.5, expected_batch_size=size, clip_norm=clip_norm)
    assert limits_of(method, quotients, rate=0.01, steps=steps).needs_attention == attention


def test_nothing_is_advised_where_nothing_moves():
    still = limits_of(METHODS["dpzero"], torch.zeros(4, 2, dtype=torch.float64))
    assert still.clip_fits and not still.needs_attention and still.ratio == 0


def test_options_of_equal_time_exist_only_where_steps_and_rows_are_left():
    plan = {"batch_size": 16, "num_directions": 4, "num_units": 1000}
    assert list_equal_times(**plan, steps=40) == []
    assert list_equal_times(**{**plan, "num_units": 32}, steps=400) == [(16, 16, 100)]
