"""Refuses a run that would take a data set's runs beyond their budget, and says what of it would fit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from hf_dpzo.data_ledger.entries import SetBudget
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.privacy.ledger import BudgetExceededError
from hf_dpzo.privacy.queries import Releases
from hf_dpzo.privacy.rounding import round_up


# How near a search comes to the largest target epsilon, as a share of it, and how many plans it may try.
_NEARNESS, _MOST_TRIES = 0.004, 12


class Replan(Protocol):
    """Plans the same run for another target epsilon, or for fewer steps; `ValueError` where there is no such plan."""

    def __call__(self, *, target_epsilon: float | None = None, max_steps: int | None = None) -> PlannedRun:
        """Return the plan."""
        ...


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is about to be entered.

    Args:
        run: the run, as it is planned.
        times: how many such runs.
        target_epsilon: the epsilon that its noise was calibrated for; `None` if its noise multiplier was set.
        replan: plans it anew; `None` if nobody knows what it was planned from, so that only its steps can be fewer.
    """

    run: PlannedRun
    times: int = 1
    target_epsilon: float | None = None
    replan: Replan | None = None

    def changed(self, change: Callable[[PlannedRun], PlannedRun]) -> Self:
        """Return this wish with the run changed by `change`, however it is planned."""
        planner = self.replan
        if planner is None:
            return replace(self, run=change(self.run))

        def replan(*, target_epsilon: float | None = None, max_steps: int | None = None) -> PlannedRun:
            return change(planner(target_epsilon=target_epsilon, max_steps=max_steps))

        return replace(self, run=change(self.run), replan=replan)


def refuse_run(path: Path, budget: SetBudget | None, others: Sequence[PlannedRun], wish: Wish) -> None:
    """Raise `BudgetExceededError` if what is wished and the `others` would come to more than `budget`.

    Args:
        path: the path of the ledger, for the message.
        budget: the budget; `None` if none was set.
        others: all other runs that count.
        wish: what is about to be entered.
    """
    if budget is None:
        return
    told, run = f"privacy_ledger={path}", wish.run
    if not run.private:
        raise BudgetExceededError(
            f"{told}: method={run.method or 'mezo'} adds no noise here, so that no epsilon would hold for the runs on "
            f"these data, and their budget is {budget.epsilon:g}; choose a private method, such as dpzero."
        )
    units = {other.unit_column for other in others if other.private}
    if units - {run.unit_column}:
        names = " and ".join(sorted(map(str, units)))
        raise BudgetExceededError(
            f"{told}: its budget is for runs with privacy_unit_column={names}, and with {run.unit_column} epsilons do "
            "not add up to theirs; set it as they have it, or keep another ledger."
        )
    total = Total.of([*others, *[run] * wish.times], delta=budget.delta, unit_column=run.unit_column)
    if not total.private:
        raise BudgetExceededError(
            f"{told}: {total.without_noise} of the runs on these data added no noise, so that no epsilon holds for "
            f"all of them and the budget of {budget.epsilon:g} cannot be kept; train on other data."
        )
    if total.epsilon > budget.epsilon:
        raise BudgetExceededError(
            f"{told}: {'this run' if total.runs == 1 else f'the {total.runs} runs on these data, this one included,'} "
            f"would come to epsilon={round_up(total.epsilon):g} at delta={budget.delta:g}, beyond their budget of "
            f"{budget.epsilon:g}; {_find_remedy(budget, others, wish)}."
        )


def _find_remedy(budget: SetBudget, others: Sequence[PlannedRun], wish: Wish) -> str:
    """Return what of the run would fit, which was tried, and how to ask for that."""
    column = wish.run.unit_column

    def compose(run: PlannedRun | None) -> float:
        runs = [*others, *([] if run is None else [run] * wish.times)]
        return Total.of(runs, delta=budget.delta, unit_column=column).epsilon

    nothing = "no step of it fits: train on other data, or raise the budget if whoever answers for them agrees"
    spent = compose(None)
    if spent >= budget.epsilon:
        return nothing
    if wish.target_epsilon is not None and wish.replan is not None:
        replan = wish.replan

        def compose_target(target: float) -> float:
            return compose(replan(target_epsilon=target))

        bounds = {"limit": budget.epsilon, "spent": spent, "beyond": wish.target_epsilon}
        largest = _find_largest_target(partial(_try, compose_target), **bounds)
        return f"set target_epsilon={largest:g} or less, which fits" if largest else nothing
    planned = wish.run.releases[0][1]
    steps = _find_steps_left(wish, compose, limit=budget.epsilon)
    if steps:
        return f"no more than {steps} of its {planned} steps fit: set max_steps={steps}, or raise noise_multiplier"
    return "no step of it fits: raise noise_multiplier"


def _find_largest_target(compose: Callable[[float], float], *, limit: float, spent: float, beyond: float) -> float:
    """Return the largest target epsilon, rounded down to three digits, at which all runs stay within `limit`.

    Each try calibrates noise, which may take seconds. So the next one is guessed: the squares about add up.

    Args:
        compose: returns what all runs come to with one of that target.
        limit: the budget.
        spent: what the other runs come to.
        beyond: a target that is too large.

    Returns:
        0 if none fits.

    >>> _find_largest_target(lambda target: target + 1, limit=2.5, spent=1.0, beyond=2.0)
    1.49
    """
    low, high = 0.0, beyond
    guess = math.sqrt(limit**2 - spent**2)
    for _ in range(_MOST_TRIES):
        guess = guess if low < guess < high else (low + high) / 2
        total = compose(guess)
        low, high = (guess, high) if total <= limit else (low, guess)
        if high - low <= _NEARNESS * high:
            break
        guess = (1 - _NEARNESS / 4) * math.sqrt(max(0.0, limit**2 - total**2 + guess**2)) if total < math.inf else 0.0
    digit = 10.0 ** (math.floor(math.log10(low)) - 2) if low else 0.0
    # Rounding changes the noise by a little, and a calibration stops short of the least by another little.
    rounded = (round((math.floor(low / digit) - fewer) * digit, 12) for fewer in range(3) if low)
    return next((target for target in rounded if compose(target) <= limit), 0.0)


def _find_steps_left(wish: Wish, compose: Callable[[PlannedRun | None], float], *, limit: float) -> int:
    """Return how many steps of a run, to a sixteenth of its plan, would keep all runs within the budget."""
    (query, planned), *report = wish.run.releases

    def compose_steps(steps: int) -> float:
        if steps and wish.replan is not None:
            return compose(wish.replan(max_steps=steps))
        releases: Releases = (*(((query, steps),) if steps else ()), *report)
        return compose(replace(wish.run, releases=releases) if releases else None)

    low, high = 0, planned
    while high - low > (max(1, planned // 16) if low else 1):  # Each look may take a second.
        middle = (low + high) // 2
        low, high = (middle, high) if _try(compose_steps, middle) <= limit else (low, middle)
    return low


def _try(compose: Callable[[Any], float], value: Any) -> float:
    """Return what runs come to; infinite where the run cannot be planned with `value`."""
    try:
        return compose(value)
    except ValueError:
        return math.inf
