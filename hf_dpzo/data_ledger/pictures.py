"""The pictures of a report: what was spent run by run, and what an attacker can do with all of it."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.data_ledger.entries import SetBudget
from hf_dpzo.data_ledger.summary import UnitSummary
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.plots import create_figure
from hf_dpzo.privacy.interpretation import detection_rate


_RATES = (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def draw_spending(unit: UnitSummary, budget: SetBudget | None, path: Path) -> str:
    """Return a picture as SVG: epsilon of each run alone, and of all runs so far, below the budget.

    Args:
        unit: the runs.
        budget: the budget that they keep; `None` if none was set.
        path: the file that the picture is for, which a message names.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = create_figure(path, size=(4.8, 3.3))
    axes = figure.add_subplot()
    counted = [line for line in unit.lines if line.run.counts]
    private = [line for line in counted if line.run.plan.private]
    summed = [line for line in counted if line.after is not None and math.isfinite(line.after.epsilon)]
    axes.bar(
        [line.run.number for line in private],
        [line.alone.epsilon for line in private],
        width=0.5,
        color="#9ecae1",
        label="this run alone",
    )
    axes.plot(
        [line.run.number for line in summed],
        [line.after.epsilon for line in summed],
        **{"color": "#08519c", "marker": "o", "drawstyle": "steps-post", "label": "all runs so far"},
    )
    for place, line in enumerate(line for line in counted if not line.run.plan.private):
        label = "a run without noise: no limit" if place == 0 else None
        axes.axvspan(line.run.number - 0.25, line.run.number + 0.25, color="#cb181d", alpha=0.6, label=label)
    if budget is not None:
        axes.axhline(budget.epsilon, color="#cb181d", linestyle="--", label=f"the budget, {budget.epsilon:g}")
    numbers = [line.run.number for line in counted]
    axes.set(xlabel="run, by its number", ylabel=f"epsilon at delta = {unit.total.delta or 0:g}", ylim=(0, None))
    axes.set_xlim(min(numbers) - 0.75, max(numbers) + 0.75)
    axes.set_xticks(numbers[:: -(-len(numbers) // 13)])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return _as_svg(figure)


def draw_attack(totals: Sequence[tuple[str, Total]], path: Path) -> str:
    """Return a picture as SVG: how many used units an attacker detects at most, by how often it is wrong about others.

    Args:
        totals: what is attacked, by its name in the legend.
        path: the file that the picture is for, which a message names.
    """
    figure = create_figure(path, size=(3.7, 3.3))
    axes = figure.add_subplot()
    for (name, total), color in zip(totals, ("#08519c", "#9ecae1"), strict=False):
        rates = [
            min(1.0, detection_rate(total.releases, delta=total.delta, false_alarms=rate)) if rate < 1 else 1.0
            for rate in _RATES
        ]
        axes.plot([100 * rate for rate in _RATES], [100 * rate for rate in rates], color=color, label=name)
    axes.plot([0, 100], [0, 100], color="black", linestyle=":", label="guessing without the models")
    axes.set(xlabel="false alarms (%)", ylabel="detected at most (%)")
    axes.set(xlim=(0, 100), ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    return _as_svg(figure)


def _as_svg(figure: object) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]
