"""From the table of results to ratios, lines and the tables of the page."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jobs import Plan, baseline_of, title, turns


AXES = {
    "num_directions": "directions (K)",
    "rows": "rows",
    "tokens": "tokens a row",
    "layers": "parameters, all trained (millions)",
    "trained": "trained parameters (millions)",
}
# What is on an axis where it is not the value that varies.
COUNTED = {"layers": "parameters", "trained": "trained_parameters"}
HEAD = ("model / trained / batch", "contender", "seconds a step", "time", "peak, MiB", "memory", "without libraries")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A contender's measure over the baseline's of the same round: the median over rounds, and the range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> "Ratio":
        """From the measures of each round.

        >>> Ratio.of({0: 2.0, 1: 9.0}, {0: 1.0, 1: 3.0})
        Ratio(median=2.5, low=2.0, high=3.0)
        """
        values = [value / theirs[number] for number, value in ours.items() if number in theirs]
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def __str__(self) -> str:
        if f"{self.low:.2f}" == f"{self.high:.2f}":
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Line:
    """`seconds = at_zero + slope * x`, by least squares."""

    at_zero: float
    slope: float
    r_squared: float

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> "Line":
        """The line closest to the points."""
        slope, at_zero = np.polyfit(xs, ys, deg=1)
        left = np.square(np.asarray(ys) - (at_zero + slope * np.asarray(xs))).sum()
        whole = np.square(np.asarray(ys) - np.mean(ys)).sum()
        return cls(at_zero=float(at_zero), slope=float(slope), r_squared=float(1 - left / whole))


class Results:
    """The rows of the table, which are those that the plan asks for.

    Raises:
        SystemExit: some are missing, or of another plan.
    """

    def __init__(self, plan: Plan, rows: Sequence[Mapping[str, str]]) -> None:
        self.plan = plan
        self._rows = {(row["case"], int(row["round"]), row["contender"]): row for row in rows}
        wanted = [key for turn in turns(plan) for key in turn.rows]
        missing = [key for key in wanted if key not in self._rows]
        if missing:
            case, number, contender = missing[0]
            raise SystemExit(
                f"results.csv: {contender} has no result in round {number} of {case}; run the same plan to its end."
            )
        if len(wanted) < len(self._rows):
            raise SystemExit(
                "results.csv: it has results that the plan does not ask for; report with the plan that ran."
            )

    def values(self, case: str, contender: str, column: str) -> dict[int, float]:
        """A measure of each round that has it."""
        found = {
            number: row[column] for (one, number, name), row in self._rows.items() if (one, name) == (case, contender)
        }
        return {number: float(value) for number, value in found.items() if value}

    def error(self, case: str, contender: str) -> str | None:
        """Why there is no measure, where there is none."""
        return self._rows[case, 0, contender]["error"] or None

    def ratio(self, case: Mapping[str, Any], contender: str, column: str, *, above: str | None = None) -> Ratio:
        """A measure over the baseline's, both less another one of the same process, `above`."""
        ours, theirs = (
            self._above(title(case), name, column, above) for name in (contender, baseline_of(self.plan, case))
        )
        return Ratio.of(ours, theirs)

    def _above(self, case: str, contender: str, column: str, above: str | None) -> dict[int, float]:
        values = self.values(case, contender, column)
        less = self.values(case, contender, above) if above else dict.fromkeys(values, 0.0)
        return {number: value - less[number] for number, value in values.items()}

    def axis(self, name: str) -> tuple[list[float], list[float]]:
        """Places along an axis, in the unit of its label, and median seconds there."""
        case, contenders = f"scaling/{name}", [str(value) for value in self.plan["scaling"]["axes"][name]["values"]]
        ys = [statistics.median(self.values(case, one, "seconds").values()) for one in contenders]
        if name not in COUNTED:
            return [float(one) for one in contenders], ys
        return [self.values(case, one, COUNTED[name])[0] / 1e6 for one in contenders], ys


def tables(results: Results, machine: Mapping[str, Any]) -> str:
    """The page's tables, in Markdown, and what they were measured on."""
    lines = [_row(HEAD), "|---" * len(HEAD) + "|"]
    for case in results.plan["cases"]:
        lines += [_row(cells) for cells in _cells(results, case)]
    lines += ["", _row(("seconds a step against", "at zero", "for each one more", "R²")), "|---" * 4 + "|"]
    for name in results.plan["scaling"]["axes"]:
        line = Line.through(*results.axis(name))
        lines.append(_row((AXES[name], f"{line.at_zero:.3f}", f"{line.slope:.3g}", f"{line.r_squared:.4f}")))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    lines += [
        "",
        f"Measured with threads: {machine['threads']}, on an {machine['cpu']} of {machine['cores']} cores and "
        f"{machine['gib']} GiB, {machine['date']}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(results: Results, case: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    baseline = baseline_of(results.plan, case)
    for name in case["contenders"]:
        label = title(case).replace("/", " / ") if name == next(iter(case["contenders"])) else ""
        if error := results.error(title(case), name):
            yield label, name, "-", f"fails: {error}", "-", "-", "-"
            continue
        seconds, peak = (
            statistics.median(results.values(title(case), name, one).values()) for one in ("seconds", "peak")
        )
        ratios = (
            ["1", "1", "1"]
            if name == baseline
            else [
                str(results.ratio(case, name, "seconds")),
                str(results.ratio(case, name, "peak")),
                str(results.ratio(case, name, "peak", above="libraries")),
            ]
        )
        yield label, name, f"{seconds:.3f}", ratios[0], f"{peak:,.0f}", *ratios[1:]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
