"""What accounting costs: predicted before anything is built, bounded for every plan, and unchanged for usual ones."""

import resource
import time

import pytest
from dp_accounting.pld import PLDAccountant, pld_pmf

from hf_dpzo.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    LIMIT,
    NEIGHBORING_RELATION,
    _build_group_event,
    account,
    account_for_group,
    build_pld_accountant,
    choose_grids,
    is_costly,
    replace_one_epsilon,
)
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.cost import PointLimit, predict_width
from hf_dpzo.privacy.dense import dense_composition
from hf_dpzo.privacy.interpretation import detection_rate, membership_accuracy, privacy_curve
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery


KINDS = {"gaussian": GaussianQuery, "laplace": LaplaceQuery}
# The noise, its multiplier, the sampling rate and the steps.
PLANS = [
    ("gaussian", 0.2, 0.1, 20),
    ("gaussian", 0.2, 1e-6, 10**5),
    ("gaussian", 0.2, 1e-4, 10**5),
    ("gaussian", 1.0, 0.01, 1000),
    ("gaussian", 1.0, 0.01, 10**5),
    ("gaussian", 5.0, 0.1, 10**4),
    ("gaussian", 1.26, 0.016, 1000),
    ("gaussian", 50.0, 1.0, 10**6),
    ("gaussian", 20.0, 0.5, 10**4),
    ("laplace", 0.06, 1e-6, 1000),
    ("laplace", 100.0, 0.1, 10**5),
    ("laplace", 1.0, 0.01, 1000),
    ("laplace", 1.0, 1.0, 100),
]
# The most CPU time for a question: less than 8 seconds on a fast processor, 17 on a slow one; minutes without a bound.
SECONDS = 40
# What a header may hold, and takes minutes or gigabytes where nothing bounds it.
HOSTILE = [
    ("gaussian", 500.0, 1.0, 10**7),
    ("gaussian", 5.0, 0.1, 10**6),
    *(
        pytest.param(plan, marks=pytest.mark.slow)
        for plan in [
            ("gaussian", 0.2, 1e-4, 10**6),
            ("gaussian", 0.3, 1e-5, 10**7),
            ("gaussian", 0.2, 1e-6, 10**6),
            ("gaussian", 1.0, 0.01, 10**7),
            ("gaussian", 50.0, 1.0, 10**6),
            ("gaussian", 0.2, 1.0, 1),
            ("gaussian", 8000.0, 0.5, 10**7),
            ("laplace", 100.0, 0.1, 10**6),
            ("laplace", 1000.0, 1.0, 10**7),
        ]
    ),
]


def release(kind: str, noise: float, rate: float, steps: int):
    return ((KINDS[kind](noise_multiplier=noise, sampling_rate=rate), steps),)


def sizes(accountant: PLDAccountant) -> list[int]:
    """The numbers of points for a unit that is removed, and for one that is added."""
    return [accountant._pld._pmf_remove.size, accountant._pld._pmf_add.size]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_prediction_is_at_least_what_is_needed_and_not_much_more(plan):
    releases = release(*plan)
    query, steps = releases[0]
    width = predict_width(releases)
    folded = query.sampling_rate == 1 and plan[0] == "gaussian"  # All releases are one.
    one = PLDAccountant(NEIGHBORING_RELATION, COARSE_GRID).compose(query.event, steps if folded else 1)
    single = sum(sizes(one)) * COARSE_GRID
    composed = max(sizes(build_pld_accountant(releases, COARSE_GRID))) * COARSE_GRID
    rounding = 9 * steps**0.5 * COARSE_GRID
    assert single <= 1.05 * width.single + 0.1 and composed <= 1.05 * width.composed + rounding + 0.1
    assert width.single <= 2.5 * single + 0.1 and width.composed <= 2.5 * composed


@pytest.mark.parametrize("size", [2, 4])
def test_a_prediction_for_a_group_is_at_least_what_is_needed(size):
    releases = release("gaussian", 0.6, 0.01, 300)
    one = PLDAccountant(NEIGHBORING_RELATION, 1e-2).compose(_build_group_event(releases[0][0], size))
    single = sum(sizes(one)) * 1e-2
    assert single <= 1.05 * predict_width(releases, size=size).single <= 2.5 * single


@pytest.mark.parametrize("plan", HOSTILE, ids=str)
def test_accounting_is_bounded_for_every_plan_that_a_header_may_hold(plan):
    releases, delta = release(*plan), 1e-9
    questions = {
        "guarantee": lambda: account(releases, delta=delta).epsilon,
        "groups": lambda: [account_for_group(releases, size=size, delta=delta) for size in (2, 4)],
        "accuracy": lambda: membership_accuracy(releases, delta=delta),
        "detection": lambda: detection_rate(releases, delta=delta),
        "curve": lambda: privacy_curve(releases, delta=delta),
        "replaced": lambda: replace_one_epsilon(releases, delta=delta),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, question in questions.items():
        began = time.process_time()
        assert question() is not None
        assert time.process_time() - began < SECONDS, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10


@pytest.mark.slow
@pytest.mark.parametrize(("target", "rate", "steps"), [(1000.0, 0.1, 10**6), (100.0, 1e-4, 10**6), (50.0, 0.5, 10**7)])
def test_calibration_is_bounded_too(target, rate, steps):
    began = time.process_time()
    query = GaussianQuery(noise_multiplier=1.0, sampling_rate=rate)
    found = calibrate_query(query, steps=steps, target_epsilon=target, target_delta=1e-9)
    assert time.process_time() - began < SECONDS
    assert account(((found, steps),), delta=1e-9).epsilon <= target


@pytest.mark.parametrize(
    "plan",
    [
        ("gaussian", 1.26344, 0.016, 1000),
        ("gaussian", 0.6, 0.01, 500),
        ("gaussian", 0.8, 0.005, 1000),
        ("gaussian", 1.0, 0.0064, 1000),
        ("gaussian", 4.0, 0.05, 10**4),
        ("laplace", 4.5, 0.016, 1000),
    ],
    ids=str,
)
def test_the_grids_of_usual_plans_are_those_that_they_always_were(plan):
    releases = release(*plan)
    assert not is_costly(releases)
    assert choose_grids(releases, 1e-9) == (COARSE_GRID, FINE_GRID) and choose_grids(releases, 1e9) == (COARSE_GRID,)


@pytest.mark.parametrize("plan", [("gaussian", 1.0, 0.01, 2000), ("gaussian", 30.0, 1.0, 1000)], ids=str)
def test_a_coarser_grid_still_gives_an_upper_bound(plan, monkeypatch):
    releases = release(*plan)
    fine = account.__wrapped__(releases, delta=1e-6).pld
    tight = PointLimit(single=LIMIT.single // 200, composed=LIMIT.composed // 200)
    width = predict_width(releases)
    coarse_grid = width.choose_grid(FINE_GRID, tight)
    assert coarse_grid > 5 * FINE_GRID
    coarse = build_pld_accountant(releases, coarse_grid).get_epsilon(1e-6)
    assert fine <= coarse <= 1.2 * fine


def test_epsilon_grows_with_the_steps_across_the_limit():
    steps = [10**4, 10**5, 3 * 10**5, 10**6]
    plans = [release("gaussian", 2.0, 0.03, count) for count in steps]
    found = [account(plan, delta=1e-6).epsilon for plan in plans]
    assert is_costly(plans[-1]) and not is_costly(plans[0])
    assert found == sorted(found)


@pytest.mark.parametrize("plan", [("gaussian", 20.0, 0.1, 500), ("laplace", 50.0, 0.1, 500)], ids=str)
def test_the_shortcut_of_composition_changes_no_bit(plan):
    ((query, steps),) = release(*plan)
    stock = PLDAccountant(NEIGHBORING_RELATION, COARSE_GRID).compose(query.event, steps)
    with dense_composition():
        quick = PLDAccountant(NEIGHBORING_RELATION, COARSE_GRID).compose(query.event, steps)
    assert isinstance(PLDAccountant(NEIGHBORING_RELATION, COARSE_GRID).compose(query.event)._pld._pmf_remove,
                      pld_pmf.SparsePLDPmf)  # fmt: skip
    assert quick.get_epsilon(1e-6) == stock.get_epsilon(1e-6) and quick.get_delta(0.1) == stock.get_delta(0.1)


def test_the_composition_of_the_library_is_left_as_it_was():
    stock = pld_pmf.SparsePLDPmf.self_compose
    with pytest.raises(KeyError), dense_composition():
        assert pld_pmf.SparsePLDPmf.self_compose is not stock
        raise KeyError
    assert pld_pmf.SparsePLDPmf.self_compose is stock
