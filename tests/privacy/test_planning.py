"""Curves of what a plan costs: each point agrees with a single plan, and points without a guarantee are left out."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hf_dpzo.privacy.planning
from hf_dpzo.plots import check_picture_path, draw_curve
from hf_dpzo.privacy.accounting import MAX_EPSILON, account
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.planning import (
    DEFAULT_CALIBRATED_POINTS,
    DEFAULT_POINTS,
    WHOLE,
    Curve,
    Plan,
    account_for_plan,
    choose_values,
    compute_curve,
)
from hf_dpzo.privacy.queries import QUERIES


NOISY = Plan(noise_multiplier=1.2, target_delta=1e-5, num_rows=5000, expected_batch_size=64, max_steps=100)
# Batches of all rows are the quickest to calibrate.
AIMED = replace(NOISY, noise_multiplier=None, target_epsilon=2.0, expected_batch_size=5000, max_steps=4)
AGAINST = {
    "max_steps": [10, 100, 1000],
    "expected_batch_size": [8, 64, 640],
    "noise_multiplier": [0.6, 1.2, 2.4],
}
NOISES = list(QUERIES)


# ---- Points ----


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("noise", NOISES)
def test_points_of_a_curve_agree_with_single_plans(noise, against):
    curve = compute_curve(replace(NOISY, noise=noise), against, AGAINST[against])
    assert [curve.value_at(point) for point in curve.points] == AGAINST[against]
    for point in curve.points:
        plan = point.plan
        query = QUERIES[noise](noise_multiplier=plan.noise_multiplier, sampling_rate=plan.expected_batch_size / 5000)
        assert point.guarantee == account(((query, plan.max_steps),), delta=1e-5)
        assert replace(plan, **{against: getattr(NOISY, against)}) == replace(NOISY, noise=noise)


@pytest.mark.parametrize("noise", NOISES)
def test_points_of_a_calibrated_curve_agree_with_single_plans(noise):
    curve = compute_curve(replace(AIMED, noise=noise), "target_epsilon", [1.0, 2.0, 4.0])
    for point, target in zip(curve.points, (1.0, 2.0, 4.0), strict=True):
        uncalibrated = QUERIES[noise](noise_multiplier=1.0, sampling_rate=1.0)
        assert point.query == calibrate_query(uncalibrated, steps=4, target_epsilon=target, target_delta=1e-5)
        assert point.guarantee.epsilon <= target


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("noise", NOISES)
def test_epsilon_grows_with_steps_and_rows_and_falls_with_noise(noise, against):
    points = compute_curve(replace(NOISY, noise=noise), against, AGAINST[against]).points
    for bound in ("epsilon", "pure") if noise == "laplace" else ("epsilon",):
        bounds = [getattr(point.guarantee, bound) for point in points]
        assert sorted(bounds, reverse=against == "noise_multiplier") == bounds
        assert len(set(bounds)) == len(bounds)


@pytest.mark.parametrize("against", [*WHOLE, "target_epsilon"])
@pytest.mark.parametrize("noise", NOISES)
def test_calibrated_noise_grows_with_steps_and_rows_and_falls_with_the_target(noise, against):
    values = {"max_steps": [1, 4, 16], "expected_batch_size": [2500, 5000], "target_epsilon": [1.0, 2.0, 4.0]}[against]
    points = compute_curve(replace(AIMED, noise=noise), against, values).points
    noises = [point.query.noise_multiplier for point in points]
    assert sorted(noises, reverse=against == "target_epsilon") == noises
    assert len(set(noises)) == len(values)


def test_bounds_in_columns_are_rounded_up():
    point = account_for_plan(NOISY)
    columns = point.as_row()
    assert columns["epsilon_pure"] is None
    for name, bound in (("", point.guarantee.epsilon), ("_pld", point.guarantee.pld), ("_rdp", point.guarantee.rdp)):
        assert bound <= columns[f"epsilon{name}"] < bound + 1e-4
    assert 0.5 < columns["best_membership_accuracy"] < 1


def test_bounds_that_do_not_apply_are_missing():
    columns = account_for_plan(replace(NOISY, noise="laplace")).as_row()
    assert columns["epsilon_rdp"] is None
    assert columns["epsilon_pure"] > columns["epsilon"] == columns["epsilon_pld"]


# ---- Points that cannot be stated ----


def test_points_that_promise_nothing_are_left_out():
    curve = compute_curve(NOISY, "noise_multiplier", [0.01, 0.02, 0.6, 2.4, 9000.0])
    assert [curve.value_at(point) for point in curve.points] == [0.6, 1.2, 2.4]
    assert curve.num_left_out == 3
    assert max(point.guarantee.epsilon for point in curve.points) <= MAX_EPSILON


def test_targets_that_no_noise_meets_are_left_out():
    curve = compute_curve(AIMED, "target_epsilon", [1.0, 2.0, 1e5, 1e6])
    assert [curve.value_at(point) for point in curve.points] == [1.0, 2.0]
    assert curve.num_left_out == 2


def test_no_point_is_accounted_beyond_the_first_that_cannot_be_stated(monkeypatch):
    """Beyond it, privacy loss distributions are so wide that they take minutes and gigabytes."""
    asked = []

    def counting_account(releases, *, delta):
        asked.append(releases[0][0].noise_multiplier)
        return account(releases, delta=delta)

    monkeypatch.setattr(hf_dpzo.privacy.planning, "account", counting_account)
    compute_curve(NOISY, "noise_multiplier", [0.001, 0.002, 0.003, 2.4])
    assert asked == [1.2, 0.003, 2.4]


def test_a_curve_of_one_point_is_refused():
    with pytest.raises(ValueError, match=r"against=noise_multiplier: an epsilon can be stated for 1.2 alone"):
        compute_curve(NOISY, "noise_multiplier", [0.001, 1.2])


def test_a_plan_that_promises_nothing_has_no_curve():
    with pytest.raises(ValueError, match="more than 1000 promises nothing"):
        compute_curve(replace(NOISY, noise_multiplier=0.01), "noise_multiplier", [1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expected_batch_size": 5001}, "expected_batch_size=5001: with 5000 rows"),
        ({"expected_batch_size": 0}, "expected_batch_size=0: with 5000 rows"),
        ({"num_rows": 0}, "expected_batch_size=64: with 0 rows"),
        ({"max_steps": 0}, "max_steps=0: there must be at least one step"),
        ({"target_delta": 0.5}, "target_delta=0.5: with 5000 rows"),
        ({"target_epsilon": 2.0}, "noise_multiplier=1.2, target_epsilon=2.0: give one of the two"),
        ({"noise_multiplier": None}, "noise_multiplier=None, target_epsilon=None: give one of the two"),
    ],
    ids=str,
)
def test_plans_that_no_run_could_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(NOISY, **changes)


# ---- Values along the axis ----


@pytest.mark.parametrize(
    ("plan", "points"), [(NOISY, DEFAULT_POINTS), (AIMED, DEFAULT_CALIBRATED_POINTS)], ids=["noisy", "aimed"]
)
def test_a_spread_extends_to_both_sides_of_the_plan_in_equal_ratios(plan, points):
    field = "noise_multiplier" if plan is NOISY else "target_epsilon"
    asked = getattr(plan, field)
    values = choose_values(plan, field)
    assert len(values) == points
    assert values[points // 2] == asked
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert ratios == pytest.approx([16 ** (1 / (points - 1))] * len(ratios), rel=1e-4)


@pytest.mark.parametrize("asked", [1, 2, 7, 64, 4999, 5000])
def test_batch_sizes_of_a_spread_are_whole_and_at_most_the_number_of_rows(asked):
    values = choose_values(replace(NOISY, expected_batch_size=asked), "expected_batch_size")
    assert all(isinstance(value, int) and 1 <= value <= 5000 for value in values)
    assert asked in values
    assert list(values) == sorted(set(values))


def test_a_spread_stays_within_its_range_and_includes_the_plan():
    assert choose_values(NOISY, "max_steps", low=50, high=400, points=4) == (50, 100, 200, 400)
    assert choose_values(NOISY, "max_steps", low=50, high=400, points=2) == (50, 100, 400)
    assert choose_values(NOISY, "max_steps", low=100, high=400, points=3) == (100, 200, 400)


@pytest.mark.parametrize(
    ("against", "changes"),
    [
        ("max_steps", {"low": 101}),
        ("max_steps", {"high": 99}),
        ("max_steps", {"low": 0}),
        ("max_steps", {"low": 0.5}),
        ("max_steps", {"low": 100, "high": 100}),
        ("max_steps", {"high": 1e10}),
        ("max_steps", {"low": math.nan}),
        ("max_steps", {"high": math.nan}),
        ("expected_batch_size", {"high": 5001}),
        ("noise_multiplier", {"low": 0}),
        ("noise_multiplier", {"low": -1}),
        ("noise_multiplier", {"high": 8193}),
        ("noise_multiplier", {"high": math.inf}),
    ],
    ids=str,
)
def test_invalid_ranges_are_refused(against, changes):
    with pytest.raises(ValueError, match=rf"from=.*, to=.*: {against} lies between .* choose a range that holds it\.$"):
        choose_values(NOISY, against, **changes)


@pytest.mark.parametrize("points", [-1, 0, 1, 201])
def test_invalid_numbers_of_points_are_refused(points):
    with pytest.raises(ValueError, match=f"points={points}: a curve has between 2 and 200 of them"):
        choose_values(NOISY, "max_steps", points=points)


# ---- Pictures ----


def draw_and_return_axes(curve: Curve, path: Path, monkeypatch) -> list:
    """Draw the curve and return its axes."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: (figures.append(figure), save(figure, *args)))
    draw_curve(curve, path)
    return figures[0].axes[0]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_are_written(tmp_path, suffix, magic):
    path = tmp_path / f"curve{suffix}"
    draw_curve(compute_curve(NOISY, "max_steps", AGAINST["max_steps"]), path)
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("noise", NOISES)
def test_pictures_show_epsilon_and_the_users_plan(tmp_path, monkeypatch, noise, against):
    curve = compute_curve(replace(NOISY, noise=noise), against, AGAINST[against])
    axes = draw_and_return_axes(curve, tmp_path / "curve.png", monkeypatch)
    *lines, mark = axes.lines
    assert [list(line.get_xdata()) for line in lines] == [AGAINST[against]] * (2 if noise == "laplace" else 1)
    assert list(lines[0].get_ydata()) == [point.guarantee.epsilon for point in curve.points]
    if noise == "laplace":
        assert list(lines[1].get_ydata()) == [point.guarantee.pure for point in curve.points]
    assert set(mark.get_xdata()) == {getattr(NOISY, against)}
    assert mark.get_ydata()[0] == curve.plan_point.guarantee.epsilon
    title = axes.get_title()
    assert title.startswith(noise.capitalize())
    assert "delta = 1e-05" in title and "5000 rows" in title and "differ by one row, added or removed" in title
    assert ("noise multiplier 1.2" in title) == (against != "noise_multiplier")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log" if against in WHOLE else "linear", "log")


def test_pictures_of_targets_show_the_noise(tmp_path, monkeypatch):
    curve = compute_curve(replace(AIMED, noise="laplace"), "target_epsilon", [1.0, 2.0, 4.0])
    axes = draw_and_return_axes(curve, tmp_path / "curve.png", monkeypatch)
    assert list(axes.lines[0].get_ydata()) == [point.query.noise_multiplier for point in curve.points]
    assert axes.get_ylabel().startswith("noise multiplier")
    assert "delta = 0;" in axes.get_title()  # Laplace noise is calibrated for pure epsilon.


def test_an_epsilon_of_zero_is_drawn(tmp_path, monkeypatch):
    """With a probability below delta, a row is in any of so few batches; a logarithmic axis has no zero."""
    plan = replace(NOISY, noise_multiplier=100.0, expected_batch_size=1, max_steps=1, target_delta=1e-4)
    curve = compute_curve(plan, "max_steps", [1, 100, 1_000_000])
    assert curve.points[0].guarantee.epsilon == 0.0
    assert draw_and_return_axes(curve, tmp_path / "curve.png", monkeypatch).get_yscale() == "linear"


def test_pictures_without_matplotlib_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="needs matplotlib, which is missing; pip install matplotlib"):
        check_picture_path(tmp_path / "curve.png")
