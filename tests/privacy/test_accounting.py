"""Epsilon, compared with golden values, with the analytic Gaussian, and with cases that dp-accounting gets wrong."""

import logging
import math

import numpy as np
import pytest
from scipy import optimize, stats

from hf_dpzo.privacy.accounting import Guarantee, account, account_for_group, replace_one_epsilon
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.interpretation import membership_accuracy
from hf_dpzo.privacy.ledger import Budget, BudgetExceededError, Ledger
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery
from hf_dpzo.privacy.rounding import round_up


def query(noise_multiplier=1.0, sampling_rate=0.01) -> GaussianQuery:
    return GaussianQuery(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)


def epsilon(noise_multiplier, sampling_rate, steps, delta) -> float:
    return account(((query(noise_multiplier, sampling_rate), steps),), delta=delta).epsilon


def analytic_gaussian_epsilon(mu: float, delta: float) -> float:
    """Solve theorem 8 of Balle and Wang 2018 for epsilon."""

    def excess(value: float) -> float:
        first = stats.norm.cdf(mu / 2 - value / mu)
        return first - math.exp(value) * stats.norm.cdf(-mu / 2 - value / mu) - delta

    return optimize.brentq(excess, 0, 100)


# PLD and, where it was noted, RDP, as dp-accounting 0.6.0 gave them when called directly.
GOLDEN = [
    (1.26344, 0.016, 1, 1e-5, 0.160, 0.643),
    (1.26344, 0.016, 10, 1e-5, 0.298, 0.695),
    (1.26344, 0.016, 100, 1e-5, 0.664, 0.909),
    (1.26344, 0.016, 500, 1e-5, 1.404, 1.568),
    (1.26344, 0.016, 1000, 1e-5, 2.000, 2.203),
    (0.6, 0.01, 500, 1e-5, 5.80, None),
    (0.8, 0.005, 1000, 1e-5, 1.59, None),
    (1.0, 0.0064, 1000, 1e-5, 1.128, None),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "pld", "rdp"), GOLDEN)
def test_epsilon_matches_the_golden_table(noise, rate, steps, delta, pld, rdp):
    spent = account(((query(noise, rate), steps),), delta=delta)
    assert spent.pld == pytest.approx(pld, abs=0.006)
    assert rdp is None or spent.rdp == pytest.approx(rdp, abs=0.006)
    assert spent.epsilon == min(spent.pld, spent.rdp)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 16), (20.0, 100)])
def test_epsilon_without_sampling_matches_the_analytic_gaussian(noise, steps):
    expected = analytic_gaussian_epsilon(math.sqrt(steps) / noise, 1e-5)
    assert expected <= epsilon(noise, 1.0, steps, 1e-5) <= expected * 1.01 + 1e-3


@pytest.mark.parametrize("kind", [int, np.float32, np.int64])
def test_epsilon_does_not_depend_on_the_type_of_the_multiplier(kind):
    """dp-accounting 0.6.0 reports 0.686 instead of 15.47 for an int inside a sampled composition."""
    assert epsilon(kind(2), 0.01, 100, 1e-5) == epsilon(2.0, 0.01, 100, 1e-5)
    assert isinstance(query(kind(2)).noise_multiplier, float)


@pytest.mark.parametrize("noise", [0, -1.0, float("nan"), float("inf")])
def test_invalid_noise_is_refused(noise):
    with pytest.raises(ValueError, match="noise_multiplier="):
        query(noise)


@pytest.mark.parametrize("rate", [0, 1.5, float("nan")])
def test_invalid_sampling_rate_is_refused(rate):
    with pytest.raises(ValueError, match="sampling_rate="):
        query(1.0, rate)


@pytest.mark.parametrize("delta", [0, 1, -1, 2, float("nan")])
def test_invalid_delta_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        account(((query(), 1),), delta=delta)


def test_a_release_without_noise_has_an_infinite_epsilon():
    assert account(((NonPrivateQuery(), 1),), delta=1e-5).epsilon == math.inf
    assert membership_accuracy(((NonPrivateQuery(), 1),), delta=1e-5) == 1.0


def test_zero_releases_cost_nothing():
    assert account((), delta=1e-5).epsilon == 0
    assert membership_accuracy((), delta=1e-5) == 0.5


def test_tiny_noise_is_left_to_the_renyi_accountant():
    spent = account(((query(0.1, 0.01), 10),), delta=1e-5)
    assert spent.pld is None
    assert spent.epsilon == spent.rdp < math.inf


def test_tiny_delta_is_left_to_the_renyi_accountant():
    assert account(((query(1.0, 0.01), 10),), delta=1e-15).pld is None


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [
        (0.5, 1e-5, 0.016, 200),
        (2.0, 1e-5, 0.002, 100),
        (8.0, 1e-6, 0.1, 50),
        (2.0, 1e-5, 1.0, 10),
        (1.0, 1e-14, 0.01, 10),
    ],
)
def test_calibration_meets_its_target_and_wastes_little(target, delta, rate, steps):
    calibrated = calibrate_query(query(1.0, rate), steps=steps, target_epsilon=target, target_delta=delta)
    achieved = account(((calibrated, steps),), delta=delta).epsilon
    assert 0.97 * target <= achieved <= target
    assert round_up(achieved) <= target


@pytest.mark.parametrize("target", [0, -1, float("nan"), float("inf")])
def test_invalid_target_is_refused(target):
    with pytest.raises(ValueError, match="target_epsilon="):
        calibrate_query(query(), steps=1, target_epsilon=target, target_delta=1e-5)


def test_a_target_so_high_that_it_needs_no_noise_is_refused():
    with pytest.raises(ValueError, match=r"target_epsilon=100000: a noise multiplier of 0\.05 gives less; lower it"):
        calibrate_query(query(), steps=1, target_epsilon=1e5, target_delta=1e-5)


def test_membership_accuracy_matches_the_exact_gaussian():
    exact = (1 + 2 * stats.norm.cdf(0.4) - 1) / 2
    assert exact <= membership_accuracy(((query(1.25, 1.0), 1),), delta=1e-5) <= exact + 1e-3


def test_two_halves_of_a_run_cost_as_much_as_the_whole():
    halves = ((query(), 5), (query(), 5))
    assert account(halves, delta=1e-5).epsilon == pytest.approx(epsilon(1.0, 0.01, 10, 1e-5), rel=1e-3)


def test_releases_with_different_noise_are_composed_as_they_ran():
    mixed = account(((query(1.0), 10), (query(2.0), 10)), delta=1e-5).epsilon
    assert epsilon(2.0, 0.01, 20, 1e-5) < mixed < epsilon(1.0, 0.01, 20, 1e-5)


def test_reported_epsilon_is_the_smaller_bound():
    assert Guarantee(delta=1e-5, rdp=2.0, pld=3.0).epsilon == 2.0
    assert Guarantee(delta=1e-5, rdp=2.0, pld=None).epsilon == 2.0


def test_ledger_merges_consecutive_equal_queries():
    ledger = Ledger()
    for release in (query(1.0), query(1.0), query(2.0), query(1.0)):
        ledger.append(release)
    assert ledger.releases == ((query(1.0), 2), (query(2.0), 1), (query(1.0), 1))
    assert len(ledger) == 4


def test_budget_refuses_the_step_after_the_last():
    budget = Budget(query=query(), planned_steps=2, delta=1e-5)
    budget.spend()
    budget.spend()
    assert budget.guarantee() == account(((query(), 2),), delta=1e-5)
    with pytest.raises(BudgetExceededError, match="of which 0 are left"):
        budget.spend()
    assert len(budget.ledger) == 2


@pytest.mark.parametrize("taken", [0, 1, 99, 100])
def test_budget_states_the_guarantee_of_its_whole_plan(taken):
    """Stopping a run, or choosing a checkpoint, may itself depend on what was released."""
    budget = Budget(query=query(), planned_steps=100, delta=1e-5)
    for _ in range(taken):
        budget.spend()
    assert budget.claimed_releases == ((query(), 100),)
    assert len(budget.ledger) == taken


def test_running_epsilon_bounds_what_was_spent_and_ends_at_the_planned_epsilon():
    budget = Budget(query=query(), planned_steps=50, delta=1e-5)
    running = []
    for _ in range(50):
        budget.spend()
        running.append(budget.running_epsilon())
        if len(running) % 7 == 0:
            assert running[-1] >= account(budget.ledger.releases, delta=1e-5).epsilon
    assert 10 < len(set(running)) <= 20
    assert running == sorted(running)
    assert running[-1] == budget.guarantee().epsilon


def test_other_trials_are_claimed_and_shown_as_if_they_had_run():
    budget = Budget(query=query(), planned_steps=20, delta=1e-5, trials=3)
    assert budget.running_epsilon() == account(((query(), 40),), delta=1e-5).epsilon
    budget.spend()
    assert budget.claimed_releases == ((query(), 60),)
    assert budget.running_epsilon() == account(((query(), 41),), delta=1e-5).epsilon
    budget.require_steps(19)
    with pytest.raises(BudgetExceededError, match="planned for 20 steps, of which 19 are left"):
        budget.require_steps(20)


def test_an_unspent_copy_of_a_budget_covers_the_same_plan():
    budget = Budget(query=query(), planned_steps=20, delta=1e-5, trials=3)
    budget.spend()
    assert budget.copy_unspent().has_same_plan(budget)
    assert len(budget.copy_unspent().ledger) == 0 and budget.copy_unspent().claimed_releases == budget.claimed_releases
    assert not budget.has_same_plan(Budget(query=query(), planned_steps=60, delta=1e-5))


def test_a_budget_without_trials_is_refused():
    with pytest.raises(ValueError, match="trials=0: this run is one of them"):
        Budget(query=query(), planned_steps=20, delta=1e-5, trials=0)


def test_closed_budget_takes_no_more_steps():
    budget = Budget(query=query(), planned_steps=100, delta=1e-5)
    budget.spend()
    budget.close()
    with pytest.raises(BudgetExceededError, match="of which 0 are left"):
        budget.require_steps()


def test_budget_without_privacy_has_no_epsilon():
    budget = Budget(query=NonPrivateQuery(), planned_steps=1, delta=None)
    with pytest.raises(ValueError, match="no epsilon"):
        budget.guarantee()


def test_a_budget_without_steps_is_refused():
    with pytest.raises(ValueError, match="planned_steps=0"):
        Budget(query=query(), planned_steps=0, delta=1e-5)


# ---- Laplace noise ----


def laplace(noise_multiplier=2.0, sampling_rate=0.01, steps=1000):
    return ((LaplaceQuery(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate), steps),)


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_rate", "steps", "pure"),
    [(2.0, 0.01, 1000, 6.466), (4.4734, 0.016, 1000, 4.0), (1.0, 1.0, 3, 3.0), (0.5, 1.0, 1, 2.0)],
)
def test_pure_epsilon_matches_known_cases(noise_multiplier, sampling_rate, steps, pure):
    assert account(laplace(noise_multiplier, sampling_rate, steps), delta=1e-5).pure == pytest.approx(pure, abs=5e-4)


def test_a_laplace_run_has_both_guarantees():
    spent = account(laplace(), delta=1e-5)
    assert spent.epsilon == spent.pld == pytest.approx(0.5305, abs=5e-3)
    assert spent.rdp is None
    assert spent.pure > spent.pld


def test_pure_epsilon_holds_at_every_delta():
    """It is reported wherever PLD gives no smaller bound."""
    assert account(laplace(), delta=1e-14).epsilon == account(laplace(), delta=1e-14).pure
    tiny = account(laplace(0.01, 0.5, 1), delta=1e-5)
    assert (tiny.pld, tiny.epsilon) == (None, pytest.approx(100 + math.log(0.5)))


def test_pure_epsilon_is_the_largest_loss_of_one_sampled_release():
    """Compare with the ratio of the densities, far from both centres."""
    b, q = 0.8, 0.3
    density = lambda x, centre: math.exp(-abs(x - centre) / b) / (2 * b)  # noqa: E731
    ratio = ((1 - q) * density(9.0, 0.0) + q * density(9.0, 1.0)) / density(9.0, 0.0)
    assert account(laplace(b, q, 1), delta=1e-5).pure == pytest.approx(math.log(ratio))


def test_membership_accuracy_of_one_laplace_release_matches_its_total_variation():
    """The total variation of two Laplace densities at distance 1 is 1 - exp(-1 / 2b)."""
    exact = (1 + 1 - math.exp(-1 / (2 * 2.0))) / 2
    assert membership_accuracy(laplace(2.0, 1.0, 1), delta=1e-5) == pytest.approx(exact, abs=1e-3)


def test_pure_epsilon_does_not_overflow_for_tiny_noise():
    assert account(laplace(1e-3, 1.0, 7), delta=1e-5).pure == pytest.approx(7000)
    assert account(laplace(1e-3, 0.5, 1), delta=1e-5).pure == pytest.approx(1000 + math.log(0.5))


def test_both_forms_of_pure_epsilon_agree():
    for loss in (0.999, 1.0, 1.001, 30.0):
        assert laplace(1 / loss, 0.3, 1)[0][0].pure_epsilon(1) == pytest.approx(math.log1p(0.3 * math.expm1(loss)))


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 300.0, 69_800.0])
@pytest.mark.parametrize("steps", [1, 80, 5000])
def test_laplace_calibration_meets_its_pure_target_closely(target, steps):
    given = LaplaceQuery(noise_multiplier=1.0, sampling_rate=0.01)
    calibrated = calibrate_query(given, steps=steps, target_epsilon=target, target_delta=1e-5)
    pure = calibrated.pure_epsilon(steps)
    assert target * (1 - 1e-6) < pure <= target


@pytest.mark.parametrize("target", [1e-300, 1e-7])
def test_laplace_calibration_refuses_targets_that_need_noise_beyond_the_lattice(target):
    given = LaplaceQuery(noise_multiplier=1.0, sampling_rate=0.5)
    with pytest.raises(ValueError, match="no noise multiplier below 8192 gives it"):
        calibrate_query(given, steps=1, target_epsilon=target, target_delta=1e-5)


@pytest.mark.parametrize("noise_multiplier", [8192, 1e300, math.inf])
def test_noise_beyond_the_lattice_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match=r"noise_multiplier=.*: it must lie between 0 and 8192"):
        query(noise_multiplier)


def test_a_budget_has_a_delta_if_and_only_if_it_has_noise():
    for wrong, delta in ((query(), None), (NonPrivateQuery(), 1e-5)):
        with pytest.raises(ValueError, match="does not go with it"):
            Budget(query=wrong, planned_steps=1, delta=delta)


# ---- Replacing a row ----


@pytest.mark.parametrize("sampling_rate", [0.05, 0.4, 1.0])
def test_replace_one_epsilon_matches_two_opposite_rows(sampling_rate):
    """Integrate numerically: N(0), or N(+1) and N(-1) where the row is in the batch."""
    noise, delta = 0.9, 1e-3
    x = np.linspace(-12, 12, 200_001)
    p, q = (
        (1 - sampling_rate) * stats.norm.pdf(x, 0, noise) + sampling_rate * stats.norm.pdf(x, centre, noise)
        for centre in (1, -1)
    )
    excess = lambda e: np.maximum(p - math.exp(e) * q, 0).sum() * (x[1] - x[0]) - delta  # noqa: E731
    exact = optimize.brentq(excess, 0, 20)
    stated = replace_one_epsilon(((query(noise, sampling_rate), 1),), delta=delta)
    assert exact - 1e-4 <= stated <= exact + 5e-3


def test_replace_one_epsilon_is_infinite_where_no_bound_is_known():
    assert replace_one_epsilon(laplace(), delta=1e-5) == math.inf
    assert replace_one_epsilon(((query(0.1, 0.1), 1),), delta=1e-5) == math.inf


# ---- Several rows of one person ----


@pytest.mark.parametrize(
    ("noise_multiplier", "rate", "steps", "size"), [(1.0, 0.2, 1, 2), (2.0, 0.5, 1, 3), (3.0, 1.0, 4, 2)]
)
def test_group_epsilon_matches_a_binomial_mixture(noise_multiplier, rate, steps, size):
    """Compare with numerical integration of the hockey-stick divergence, for one step or for steps over all rows."""
    delta = 1e-5
    epsilon = account_for_group(
        ((GaussianQuery(noise_multiplier=noise_multiplier, sampling_rate=rate), steps),), size=size, delta=delta
    )
    scale = noise_multiplier / math.sqrt(steps)  # Steps over all rows add up to one with less noise.
    x = np.linspace(-20 * scale, size + 20 * scale, 400_001)
    weights = [math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)]
    density = [np.exp(-((x - k) ** 2) / (2 * scale**2)) / (scale * math.sqrt(2 * math.pi)) for k in range(size + 1)]
    present, absent = sum(w * d for w, d in zip(weights, density, strict=True)), density[0]

    def spent(at: float) -> float:
        both = (
            np.maximum(a - math.exp(at) * b, 0).sum() * (x[1] - x[0]) for a, b in ((present, absent), (absent, present))
        )
        return max(both)

    assert spent(epsilon) <= delta * 1.001
    assert spent(0.98 * epsilon) > delta


def test_a_group_of_one_costs_as_much_as_one_row():
    releases = ((GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01), 200),)
    assert account_for_group(releases, size=1, delta=1e-5) == pytest.approx(
        account(releases, delta=1e-5).epsilon, rel=0.02
    )


def test_a_group_costs_more_than_its_size_times_epsilon():
    """At the same delta, multiplying epsilon would promise too much."""
    releases = ((GaussianQuery(noise_multiplier=1.26, sampling_rate=0.016), 1000),)
    one = account(releases, delta=1e-5).epsilon
    assert account_for_group(releases, size=4, delta=1e-5) > 4.5 * one


def test_pure_epsilon_of_a_group_is_its_size_times_pure_epsilon():
    releases = ((LaplaceQuery(noise_multiplier=4.0, sampling_rate=0.1), 10),)
    assert account_for_group(releases, size=3, delta=1e-5) == pytest.approx(3 * releases[0][0].pure_epsilon(10))


def test_accounting_does_not_configure_the_logging_of_the_process(monkeypatch):
    """A release of which the Rényi accountant leaves orders out, and warns of that."""
    monkeypatch.setattr(logging.root, "handlers", [])
    query = GaussianQuery(noise_multiplier=0.9, sampling_rate=0.06)
    account.cache_clear()
    account(((query, 3),), delta=1e-5)
    calibrate_query(query, steps=3, target_epsilon=9.0, target_delta=1e-5)
    assert logging.root.handlers == []
