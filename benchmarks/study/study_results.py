"""The results of the study as tables in Markdown: means over seeds, with the standard error of each mean."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Results:
    """All runs.

    Args:
        rows: one mapping for each run.
        untouched: the accuracy of the model itself on each task, by label words.
    """

    rows: Sequence[Mapping[str, Any]]
    untouched: Mapping[str, float]

    def accuracies(self, *, task: str, setting: str, contender: str, epsilon: float | None) -> list[float]:
        """Return the accuracy of each seed of one cell."""
        wanted = {"task": task, "setting": setting, "contender": contender}
        # A run without privacy has no epsilon, and stands beside all of them.
        return [
            row["accuracy"]
            for row in self.rows
            if row["epsilon"] in (epsilon, None) and all(row[name] == value for name, value in wanted.items())
        ]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of several runs.

    Args:
        value: the mean.
        error: its standard error.
    """

    value: float
    error: float

    @classmethod
    def measure(cls, values: Sequence[float]) -> "Mean":
        """Return the mean of `values`.

        >>> str(Mean.measure([0.80, 0.82, 0.84]))
        '82.0 ± 1.2'
        """
        return cls(value=statistics.mean(values), error=statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f}"


def format_report(results: Results, plan: Mapping[str, Any]) -> str:
    """Return a table for each setting: contenders down, tasks and epsilons across."""
    lines: list[str] = []
    for setting, facts in plan["settings"].items():
        tasks = [task for task in plan["tasks"] if any(_is_of(row, task, setting) for row in results.rows)]
        columns = [(task, epsilon) for task in tasks for epsilon in facts["epsilons"]]
        if not columns:  # None of its runs has ended.
            continue
        lines += ["", f"{setting}: {facts['rows']} rows", ""]
        lines.append("| | " + " | ".join(f"{task}, ε = {epsilon:g}" for task, epsilon in columns) + " |")
        lines.append("|---" * (len(columns) + 1) + "|")
        lines += _format_contenders(results, plan, setting, columns)
    untouched = ", ".join(f"{task} {100 * value:.1f}" for task, value in results.untouched.items())
    return "\n".join([*lines, "", f"Untouched: {untouched}.", ""]).lstrip("\n")


def _is_of(row: Mapping[str, Any], task: str, setting: str) -> bool:
    return row["task"] == task and row["setting"] == setting


def _format_contenders(
    results: Results, plan: Mapping[str, Any], setting: str, columns: Sequence[tuple[str, float]]
) -> Iterator[str]:
    for contender in plan["contenders"]:
        cells = []
        for task, epsilon in columns:
            found = results.accuracies(task=task, setting=setting, contender=contender, epsilon=epsilon)
            cells.append(str(Mean.measure(found)) if len(found) > 1 else "-")
        yield f"| {contender} | {' | '.join(cells)} |"
