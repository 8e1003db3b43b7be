"""`hf-dpzo ledger`: what all runs on the same rows have spent, the budget that they keep, and a report of it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dpzo.cli.output import Outcome, Subparsers, format_table
from hf_dpzo.plots import check_output_path
from hf_dpzo.privacy.rounding import round_up


if TYPE_CHECKING:
    from hf_dpzo.data_ledger.summary import RunLine, Summary, UnitSummary


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("ledger", help="what all runs on the same rows have spent, and their budget")
    parser.add_argument("path", help="the ledger that runs were given in privacy_ledger")
    parser.add_argument(
        "--budget",
        type=float,
        help="set the largest epsilon of all runs together, at --delta; it is kept in the ledger, and a run that "
        "would pass it is refused",
    )
    parser.add_argument("--delta", type=float, help="the delta of the budget, or else of the epsilon that is shown")
    parser.add_argument(
        "--add", nargs="+", metavar="FOLDER", default=[], help="enter runs that were made without it, by their logs"
    )
    parser.add_argument("--report", help="write a report for a data protection officer into this file: .html")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.data_ledger.data_ledger import DataLedger
    from hf_dpzo.data_ledger.earlier import enter_earlier_runs
    from hf_dpzo.data_ledger.report import write_report
    from hf_dpzo.data_ledger.summary import Summary

    if arguments.report is not None:
        _check_report(Path(arguments.report))
    begins = arguments.budget is not None or bool(arguments.add)
    if arguments.budget is not None and arguments.delta is None and not Path(arguments.path).expanduser().exists():
        raise ValueError(f"budget={arguments.budget:g}: an epsilon is stated at a delta; add --delta, such as 1e-6.")
    _check_entries(arguments)
    ledger = DataLedger(arguments.path, create=begins)
    enter_earlier_runs(ledger, arguments.add)
    if arguments.budget is not None:
        ledger.set_budget(epsilon=arguments.budget, delta=arguments.delta)
    summary = Summary.of(ledger, delta=arguments.delta)
    if arguments.report is not None:
        write_report(summary, Path(arguments.report))
    text = f"{json.dumps(_as_json(summary), indent=2)}\n" if arguments.json else _format(summary)
    if arguments.report is not None and not arguments.json:
        text += f"\n{format_table([('written', arguments.report)])}"
    return Outcome(text=text, status=0 if summary.keeps_budget else 1)


def _check_entries(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` for what could not be entered, before a ledger is begun for it."""
    from hf_dpzo.privacy.accounting import check_delta
    from hf_dpzo.trajectory.log import Trajectory

    for folder in arguments.add:
        Trajectory.read(folder)
    if arguments.budget is not None and not 0 < arguments.budget < float("inf"):
        raise ValueError(
            f"budget={arguments.budget:g}: an epsilon is above 0; set what these data may be used up for, such as 8."
        )
    if arguments.budget is not None and arguments.delta is not None:
        check_delta(arguments.delta)


def _check_report(path: Path) -> None:
    if path.suffix != ".html":
        raise ValueError(f"report={path}: it does not end in .html; name a file that does.")
    check_output_path(path, flag="report")


def _format(summary: "Summary") -> str:
    tables = [format_table([*_describe_unit(unit), *_describe_budget(summary)]) for unit in summary.units]
    lines = [_describe_run(line) for unit in summary.units for line in unit.lines]
    if lines:
        heads = (
            "run",
            "entered",
            "state",
            "method",
            "noise",
            "rate",
            "epsilon alone",
            "so far",
            "its rows",
            "folder",
        )
        unique = dict.fromkeys(sorted(lines, key=lambda line: int(line[0])))
        tables.append(format_table([heads, *unique]))
    return "\n".join(tables)


def _describe_unit(unit: "UnitSummary") -> list[tuple[str, str]]:
    total, most = unit.total, unit.most_affected
    runs = str(total.runs) if total.private else f"{total.runs}, of which {total.without_noise} added no noise"
    protected = "rows" if total.unit_column is None else f"users (column {total.unit_column})"
    # Before the first run, nobody knows what runs will protect.
    unit_line = [("protected", protected)] if total.runs else []
    lines = [("runs that count", runs), *unit_line, ("epsilon in all", _show(total.epsilon))]
    if total.delta is not None:
        lines.append(("delta", f"{total.delta:g}"))
    lines.append(
        ("best guess of membership", f"right at most {round_up(100 * total.membership_accuracy, 1):g} % of the time")
    )
    lines.append(("detected, with 1 false alarm in 100", f"at most {round_up(100 * total.detection_rate, 1):g} %"))
    if most.runs < total.runs:
        text = f"{_show(most.epsilon)}, in {most.runs} runs, if no {unit.unit} was edited in between"
        lines.append((f"epsilon of the {unit.unit} in most runs", text))
    if total.of_other_units:
        lines.append(("runs that protect another unit", f"{total.of_other_units}, which do not add up with these"))
    return lines


def _show(epsilon: float) -> str:
    return f"{round_up(epsilon):g}" if epsilon < float("inf") else "none holds"


def _describe_budget(summary: "Summary") -> list[tuple[str, str]]:
    budget = summary.entries.budget
    if budget is None:
        return [("budget", "none; --budget sets one")]
    kept = "kept" if summary.keeps_budget else "EXCEEDED"
    return [("budget", f"{budget.epsilon:g} at delta {budget.delta:g}: {kept}")]


def _describe_run(line: "RunLine") -> tuple[str, ...]:
    run, plan = line.run, line.run.plan
    query = plan.releases[0][0] if plan.releases else None
    noise, rate = (
        ("none", "")
        if query is None or not plan.private
        else (
            f"{query.noise_multiplier:.4g}",
            f"{query.sampling_rate:.4g}",
        )
    )
    after = "" if line.after is None else _show(line.after.epsilon)
    return (
        *(str(run.number), run.entered_at, line.state, plan.method, noise, rate),
        *(_show(line.alone.epsilon), after, line.rows, plan.folder),
    )


def _as_json(summary: "Summary") -> dict[str, Any]:
    budget = summary.entries.budget
    return {
        "budget": None if budget is None else {"epsilon": budget.epsilon, "delta": budget.delta},
        "within_budget": summary.keeps_budget,
        "units": [
            {
                **unit.total.for_card(),
                "unit_column": unit.total.unit_column,
                "best_membership_accuracy": round_up(unit.total.membership_accuracy),
                "detection_rate": round_up(unit.total.detection_rate),
                "entries": [
                    {
                        "run": line.run.number,
                        "entered_at": line.run.entered_at,
                        "state": line.run.state,
                        "method": line.run.plan.method,
                        "folder": line.run.plan.folder,
                        "planned_steps": line.run.plan.planned_steps,
                        "steps_seen": line.run.steps,
                        "epsilon_alone": None if not line.run.plan.private else round_up(line.alone.epsilon),
                    }
                    for line in unit.lines
                ],
            }
            for unit in summary.units
        ],
    }
