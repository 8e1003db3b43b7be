"""The permanent attack finds nothing beyond the sensitivity, and finds each fault that is planted."""

import importlib
import random
import sys
from types import SimpleNamespace

import pytest

from hf_dpzo.methods import METHODS, PrivateMethod

from support.paths import MEASUREMENTS


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(MEASUREMENTS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("attack", "attack_plans", "odd_rows")})
    sys.path.remove(str(MEASUREMENTS))


@pytest.mark.parametrize("pairs", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_pair_is_beyond_the_sensitivity(recipe, pairs):
    found = recipe.attack.run(pairs, seed=pairs)
    assert len(found) == pairs
    assert not any(one.is_beyond for one in found)
    assert max(one.distance for one in found) > 0.99  # Some rows are clipped.


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["clip", "norm", "cut", "failure"])
def test_a_planted_fault_is_found(recipe, plant):
    assert sum(one.is_beyond for one in recipe.attack.run(400, seed=1, plant=plant)) > 2


def test_plans_cover_all_private_methods_noises_units_and_processes(recipe):
    drawing = random.Random(0)
    plans = [recipe.attack_plans.Plan.draw(drawing) for _ in range(300)]
    names = {type(plan.method) for plan in plans}
    assert names == {kind for kind in METHODS.values() if issubclass(kind, PrivateMethod)}
    for facts in (
        {plan.title.split(", ")[1] for plan in plans},
        {plan.max_rows is None for plan in plans},
        {plan.padded for plan in plans},
        {plan.shares_points for plan in plans},
    ):
        assert len(facts) == 2
    assert {plan.num_processes for plan in plans} == {1, 2, 3}


def test_lengths_are_compared_in_exact_integers(recipe):
    drawing = random.Random(0)
    plans = [recipe.attack_plans.Plan.draw(drawing) for _ in range(100)]
    for plan in plans:
        directions = plan.method.num_directions if "zoso" in plan.title or "zopo" in plan.title else 1
        longest = [2**40] * directions
        assert plan.measure(longest) == 1.0
        assert plan.measure([2**40 + 1, *longest[1:]]) > 1
