"""Refuses a run that would take a data set's runs beyond their budget, and says what would fit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_dpzo.data_ledger.entries import SetBudget
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.privacy.ledger import BudgetExceededError
from hf_dpzo.privacy.queries import Releases
from hf_dpzo.privacy.rounding import round_up


def refuse_run(path: Path, budget: SetBudget | None, others: Sequence[PlannedRun], run: PlannedRun) -> None:
    """Raise `BudgetExceededError` if `run` and the `others` would come to more than `budget`.

    Args:
        path: the path of the ledger, for the message.
        budget: the budget; `None` if none was set.
        others: all other runs that count.
        run: the run that is about to be entered.
    """
    if budget is None:
        return
    told = f"privacy_ledger={path}"
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
    total = Total.of([*others, run], delta=budget.delta, unit_column=run.unit_column)
    if not total.private:
        raise BudgetExceededError(
            f"{told}: {total.without_noise} of the runs on these data added no noise, so that no epsilon holds for "
            f"all of them and the budget of {budget.epsilon:g} cannot be kept; train on other data."
        )
    if total.epsilon > budget.epsilon:
        steps = _find_steps_left(budget, others, run)
        left = f"no more than {steps} of its {run.releases[0][1]} steps fit" if steps else "nothing of it fits"
        raise BudgetExceededError(
            f"{told}: with this run, the {total.runs} on these data would come to "
            f"epsilon={round_up(total.epsilon):g} at delta={budget.delta:g}, beyond their budget of "
            f"{budget.epsilon:g}; {left}: lower target_epsilon or max_steps, or raise noise_multiplier."
        )


def _find_steps_left(budget: SetBudget, others: Sequence[PlannedRun], run: PlannedRun) -> int:
    """Return how many steps of `run`, to a sixteenth of its plan, would keep all runs within the budget."""
    (query, planned), *report = run.releases

    def fits(steps: int) -> bool:
        releases: Releases = (*(((query, steps),) if steps else ()), *report)
        shorter = Total.of(
            [*others, *([replace(run, releases=releases)] if releases else [])],
            delta=budget.delta,
            unit_column=run.unit_column,
        )
        return shorter.epsilon <= budget.epsilon

    low, high = 0, planned
    while high - low > max(1, planned // 16):  # Each look may take a second.
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
