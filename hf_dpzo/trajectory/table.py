"""A log as tables: what was released, and what it spent, step by step."""

import math
from typing import TYPE_CHECKING

from hf_dpzo.io.html import format_html_table
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.run import LoggedRun


if TYPE_CHECKING:
    import pandas as pd


def tabulate(log: Trajectory) -> "pd.DataFrame":
    """Return a row for each step of `log`: see `Trajectory.to_pandas`."""
    import pandas as pd

    run = LoggedRun.from_log(log)
    unit, budget = run.method.mechanism.unit, run.budget.copy_unspent()
    rows = []
    for record in log.records:
        budget.spend()
        rows.append(
            {
                "step": record.step + 1,
                "epsilon": budget.running_epsilon() if budget.private else math.nan,
                "learning_rate": record.learning_rates[0],
                "smoothing": record.smoothing,
                "lost": record.void,
                **{f"coefficient_{number}": integer * unit for number, integer in enumerate(record.integers)},
            }
        )
    columns = ["step", "epsilon", "learning_rate", "smoothing", "lost"]
    columns += [f"coefficient_{number}" for number in range(log.layout.num_directions)]
    return pd.DataFrame(rows, columns=columns).set_index("step")


def format_log(log: Trajectory) -> str:
    """Return the run of `log` as a table in HTML."""
    run = LoggedRun.from_log(log)
    rows: list[tuple[str, object]] = [
        ("method", run.method_name),
        ("base model", log.header["base"]["name"] or "a model in memory"),
        ("steps", f"{len(log.records)} of {run.budget.planned_steps}"),
        ("directions a step", log.layout.num_directions),
        (run.unit_name + "s", run.num_units),
    ]
    if run.budget.private:
        rows.append(("epsilon", f"{round_up(run.budget.guarantee().epsilon):g}"))
        rows.append(("delta", f"{run.budget.delta:g}"))
    else:
        rows.append(("privacy", "none: the method adds no noise"))
    rows.append(("checksum", log.checksum_after(len(log.records)).hex()))
    return format_html_table(rows, caption="Trajectory")
