"""The one door, without a model: exact sensitivity, noise of the stated scale, and nothing else passes."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.clipping import SENSITIVITY, clip_to_lattice
from hf_dpzo.privacy.mechanism import (
    NOISES,
    ClippedSum,
    GaussianSum,
    LaplaceSum,
    PlainMean,
    Release,
    SeparateGaussianSum,
)
from hf_dpzo.privacy.noise import DiscreteGaussian
from hf_dpzo.privacy.queries import QUERIES, GaussianQuery, LaplaceQuery, NonPrivateQuery


AWKWARD = [0.0, -0.0, 1e-320, 1e-30, 0.5, 1.0, 1 + 2**-52, 3.7, -2.0, 1e20, 1e200, 1.7e308, -1.7e308]
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(DiscreteGaussian, "add", lambda self, values: list(values))


def mechanism(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=8) -> GaussianSum:
    return GaussianSum(clip_norm=clip_norm, noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size)


def random_rows(batch, directions, seed=0) -> torch.Tensor:
    """Return rows of very different lengths, with awkward values in some of them."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(batch, directions)) * 10.0 ** draw.integers(-6, 7, size=(batch, 1))
    rows[draw.random(rows.shape) < 0.1] = draw.choice(AWKWARD + NOT_FINITE)
    return torch.tensor(rows)


def exact_row(row: list[float], clip_norm: float) -> list[Fraction]:
    """The plain twin: clip one row in rational arithmetic, in lattice steps, without truncation."""
    values = [Fraction(value) if math.isfinite(value) else Fraction(0) for value in row]
    squares = sum(value**2 for value in values)
    limit = Fraction(clip_norm)
    if squares > limit**2:
        # The root to 200 bits, far beyond what the lattice shows.
        root = Fraction(math.isqrt(int(squares * 2**400)), 2**200)
        values = [value * limit / root for value in values]
    return [value / limit * SENSITIVITY for value in values]


@pytest.mark.parametrize("directions", [1, 2, 16])
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 200.0])
def test_clipping_agrees_with_rational_arithmetic(directions, clip_norm):
    rows = random_rows(40, directions)
    for row, integers in zip(rows.tolist(), clip_to_lattice(rows, clip_norm).tolist(), strict=True):
        for exact, integer in zip(exact_row(row, clip_norm), integers, strict=True):
            assert abs(integer) <= abs(exact) * (1 + Fraction(1, 2**44)) + Fraction(1, 2**10)
            assert abs(exact - integer) < 3


@pytest.mark.parametrize("directions", [1, 2, 3, 16, 64])
def test_no_row_is_longer_than_the_clip_norm_in_exact_arithmetic(directions):
    rows = torch.cat([random_rows(300, directions, seed=seed) for seed in range(5)])
    for integers in clip_to_lattice(rows, 0.7).tolist():
        assert sum(integer * integer for integer in integers) <= SENSITIVITY**2


def test_rows_at_the_clip_norm_are_not_rounded_beyond_it():
    """3-4-5 triangles and equal entries, whose norms float64 rounds up as often as down."""
    draw = np.random.default_rng(0)
    rows = np.concatenate([draw.choice([3, 4, 5, 12, 13, 1], size=(2000, 4)), np.ones((10, 4))])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) * draw.choice([1, 1 + 2**-52, 1 - 2**-53], size=(2010, 1))
    for integers in clip_to_lattice(torch.tensor(rows), 1.0).tolist():
        assert sum(integer * integer for integer in integers) <= SENSITIVITY**2


def test_rows_within_the_clip_norm_are_kept():
    rows = torch.tensor([[0.3, -0.4], [1e-6, 0.0]])
    expected = rows.double().numpy() / 2.0
    assert np.abs(clip_to_lattice(rows, 2.0) / SENSITIVITY - expected).max() < 2**-40


@pytest.mark.parametrize("value", NOT_FINITE)
def test_non_finite_values_count_as_zero(value):
    assert clip_to_lattice(torch.tensor([[value]]), 1.0).tolist() == [[0]]
    assert clip_to_lattice(torch.tensor([[value, 0.5]]), 1.0).tolist() == [[0, SENSITIVITY // 2]]


def test_huge_values_are_clipped_and_do_not_count_as_zero():
    assert clip_to_lattice(torch.tensor([[1.7e308], [-1e200]], dtype=torch.float64), 1e-3).tolist() == [
        [SENSITIVITY - 1],
        [1 - SENSITIVITY],
    ]


def test_overflowing_losses_count_as_zero():
    overflow = torch.tensor([70.0], dtype=torch.float16) * 1000 - torch.tensor([1.0], dtype=torch.float16)
    assert clip_to_lattice((overflow / 1e-3).double().unsqueeze(1), 1.0).tolist() == [[0]]


def test_sum_does_not_depend_on_order_or_grouping(no_noise):
    rows = random_rows(30, 4)
    whole = mechanism().release(rows).integers
    assert mechanism().release(rows.flip(0)).integers == whole
    for size in (1, 3, 7):
        parts = [mechanism().release(part).integers for part in rows.split(size)]
        assert tuple(np.sum(parts, axis=0).tolist()) == whole


@pytest.mark.parametrize("seed", range(20))
def test_neighbours_differ_by_at_most_the_clip_norm(no_noise, seed):
    rows = random_rows(12, 5, seed=seed)
    whole = mechanism().release(rows).integers
    for left_out in range(len(rows)):
        others = mechanism().release(torch.cat([rows[:left_out], rows[left_out + 1 :]])).integers
        squares = sum((a - b) ** 2 for a, b in zip(whole, others, strict=True))
        assert squares <= SENSITIVITY**2


@pytest.mark.parametrize("value", [1.0, 1e30])
def test_a_row_can_move_the_sum_by_a_whole_clip_norm(no_noise, value):
    """A tighter clip would waste privacy: one row does move the sum by a clip norm, less one part in 2**40."""
    with_row, without = (mechanism().release(rows).integers for rows in (torch.tensor([[value]]), torch.zeros(0, 1)))
    assert with_row[0] - without[0] == SENSITIVITY - 1


def released(rows: torch.Tensor, count: int, **settings) -> np.ndarray:
    return np.array([mechanism(**settings).release(rows).coefficients for _ in range(count)])


@pytest.mark.parametrize("directions", [1, 8])
def test_noise_of_a_release_is_noise_multiplier_times_clip_norm_over_expected_batch(directions):
    """The unit does not depend on K; two thirds and three halves of the scale are rejected."""
    values = released(torch.zeros(5, directions), 3000 // directions, clip_norm=3.0, noise_multiplier=0.7)
    standard = values.flatten() / (0.7 * 3.0 / 8)
    assert stats.kstest(standard, "norm").pvalue > 1e-7
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(standard / wrong, "norm").pvalue < 1e-9


def test_an_empty_batch_releases_noise_alone():
    values = released(torch.zeros(0, 1), 2000).flatten() * 8
    assert stats.kstest(values, "norm").pvalue > 1e-7


def test_scale_does_not_depend_on_the_number_of_rows(no_noise):
    one, many = (mechanism().release(torch.full((rows, 1), 0.5)).coefficients[0] for rows in (1, 40))
    assert many == pytest.approx(40 * one)


def test_a_release_holds_integers_for_every_input():
    for rows in (torch.zeros(0, 3), random_rows(9, 3)):
        assert all(type(integer) is int for integer in mechanism().release(rows).integers)


def test_two_releases_of_the_same_rows_differ():
    assert mechanism().release(torch.zeros(1, 1)).integers != mechanism().release(torch.zeros(1, 1)).integers


def test_stated_noise_is_the_noise_that_is_drawn():
    stated = mechanism(noise_multiplier=0.1).query(0.5)
    assert stated == GaussianQuery(noise_multiplier=math.ceil(0.1 * SENSITIVITY) / SENSITIVITY, sampling_rate=0.5)
    assert stated.noise_multiplier >= 0.1


def test_rows_without_a_direction_axis_are_refused():
    with pytest.raises(ValueError, match="ndim=1"):
        mechanism().release(torch.zeros(3))


def test_plain_mean_is_the_mean_and_claims_nothing():
    rows = torch.tensor([[1.0, 200.0], [3.0, -100.0]])
    release = PlainMean().release(rows)
    assert release.coefficients == pytest.approx([2.0, 50.0])
    assert PlainMean().query(0.5) == NonPrivateQuery()


def test_plain_mean_of_nothing_is_zero():
    assert PlainMean().release(torch.zeros(0, 2)).coefficients == [0.0, 0.0]


def test_coefficients_are_integers_times_unit():
    assert Release(integers=(4, -8), unit=0.5).coefficients == [2.0, -4.0]


# ---- Separately clipped coefficients ----


def separate(directions, noise_multiplier=1.0, clip_norm=1.0) -> SeparateGaussianSum:
    return SeparateGaussianSum(
        clip_norm=clip_norm, noise_multiplier=noise_multiplier, num_directions=directions, expected_batch_size=8
    )


def test_separate_clipping_clips_each_coefficient(no_noise):
    rows = random_rows(30, 4)
    kept = torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0).clamp(-0.3, 0.3)
    released = separate(4, clip_norm=0.3).release(rows).coefficients
    assert released == pytest.approx((kept.sum(dim=0) / 8).tolist(), abs=1e-9)


@pytest.mark.parametrize("directions", [1, 4, 9])
def test_separate_coefficients_get_the_root_of_k_times_the_noise(directions):
    mechanism = separate(directions, noise_multiplier=0.7, clip_norm=3.0)
    values = np.array([mechanism.release(torch.zeros(2, directions)).coefficients for _ in range(3000 // directions)])
    standard = values.flatten() / (0.7 * 3.0 * math.sqrt(directions) / 8)
    assert stats.kstest(standard, "norm").pvalue > 1e-7
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(standard / wrong, "norm").pvalue < 1e-9


@pytest.mark.parametrize("directions", [1, 3, 10, 64])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 77.7])
def test_noise_of_separate_coefficients_is_at_least_what_is_stated(directions, noise_multiplier):
    mechanism = separate(directions, noise_multiplier=noise_multiplier)
    stated = Fraction(mechanism.query(0.5).noise_multiplier)
    # noise >= stated * sqrt(K) * sensitivity, squared and exact.
    assert mechanism._noise.scale**2 >= stated**2 * directions * SENSITIVITY**2


def test_epsilon_of_separate_coefficients_counts_every_release():
    """P coefficients in each of T steps cost as much as P * T releases of one coefficient with the same noise."""
    mechanism = separate(4, noise_multiplier=3.0)
    each = GaussianQuery(noise_multiplier=mechanism._noise.scale / SENSITIVITY, sampling_rate=1.0)
    together = account(((mechanism.query(1.0), 10),), delta=1e-5).epsilon
    one_by_one = account(((each, 4 * 10),), delta=1e-5).epsilon
    assert together == pytest.approx(one_by_one, rel=1e-3)
    as_published = account(((each, 10),), delta=1e-5).epsilon
    assert together > 1.9 * as_published


def test_rows_with_a_wrong_number_of_coefficients_are_refused():
    with pytest.raises(ValueError, match="num_directions=3: a row has 2 coefficients"):
        separate(3).release(torch.zeros(1, 2))


# ---- Laplace noise ----


def laplace(noise_multiplier=1.0, clip_norm=1.0) -> LaplaceSum:
    return LaplaceSum(clip_norm=clip_norm, noise_multiplier=noise_multiplier, expected_batch_size=8)


@pytest.mark.parametrize("directions", [1, 3, 16])
def test_no_row_is_longer_than_the_clip_norm_in_l1(directions):
    rows = torch.cat([random_rows(300, directions, seed=seed) for seed in range(5)])
    for integers in clip_to_lattice(rows, 0.7, order=1).tolist():
        assert sum(abs(integer) for integer in integers) <= SENSITIVITY


def test_rows_within_the_l1_norm_are_kept():
    assert clip_to_lattice(torch.tensor([[0.25, -0.5]]), 1.0, order=1).tolist() == [[2**38, -(2**39)]]
    assert clip_to_lattice(torch.tensor([[3.0, -1.0]]), 1.0, order=1)[0] * 2.0**-40 == pytest.approx([0.75, -0.25])


@pytest.mark.parametrize("directions", [1, 6])
def test_laplace_noise_of_a_release_is_noise_multiplier_times_clip_norm(directions):
    mechanism = laplace(0.7, 3.0)
    values = np.array([mechanism.release(torch.zeros(0, directions)).coefficients for _ in range(3000 // directions)])
    standard = values.flatten() / (0.7 * 3.0 / 8)
    assert stats.kstest(standard, "laplace").pvalue > 1e-7
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(standard / wrong, "laplace").pvalue < 1e-9


@pytest.mark.parametrize(("scale", "sensitivity"), [(1, 1), (3, 2), (2, 7), (40, 16), (5, 64)])
def test_discrete_laplace_is_dominated_by_the_noise_that_it_is_accounted_as(scale, sensitivity):
    """Sum directly: for every epsilon, delta is at most the continuous one for two more steps of sensitivity."""
    a = math.exp(-1 / scale)
    support = np.arange(-60 * scale, 60 * scale + sensitivity)
    mass = lambda centre: (1 - a) / (1 + a) * a ** np.abs(support - centre)  # noqa: E731
    for epsilon in np.linspace(0, (sensitivity + 3) / scale, 60):
        discrete = np.maximum(mass(0) - np.exp(epsilon) * mass(sensitivity), 0).sum()
        continuous = max(0.0, 1 - math.exp((epsilon - (sensitivity + 2) / scale) / 2))
        assert discrete <= continuous + 1e-12


def test_stated_laplace_noise_is_the_noise_that_is_drawn():
    mechanism = laplace(0.1)
    stated = mechanism.query(0.5)
    assert stated == LaplaceQuery(noise_multiplier=mechanism._noise.scale / (SENSITIVITY + 2), sampling_rate=0.5)
    assert stated.noise_multiplier >= 0.1


# ---- No noise ----


def test_clipped_sum_claims_nothing():
    mechanism = ClippedSum(clip_norm=0.5, expected_batch_size=4)
    assert mechanism.release(torch.tensor([[3.0], [0.25]])).coefficients == pytest.approx([0.75 / 4])
    assert mechanism.query(0.5) == NonPrivateQuery()


def test_the_limit_of_rows_does_not_depend_on_the_number_of_directions(monkeypatch):
    from hf_dpzo.privacy import clipping as module

    monkeypatch.setattr(module, "MAX_ROWS", 10)
    assert len(separate(3).release(torch.zeros(10, 3)).integers) == 3
    with pytest.raises(ValueError, match="a logical batch holds more than 10 rows"):
        separate(3).release(torch.zeros(11, 3))


@pytest.mark.parametrize("name", NOISES)
def test_every_noise_states_the_query_of_its_name(name):
    mechanism = NOISES[name](clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=8)
    assert type(mechanism.query(0.5)) is QUERIES[name]
    assert set(QUERIES) == set(NOISES)
