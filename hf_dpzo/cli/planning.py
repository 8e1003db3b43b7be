"""`hf-dpzo epsilon` and `hf-dpzo calibrate`: plan a budget, without a model."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.curves import add_curve_flags, write_curve
from hf_dpzo.cli.output import Outcome, Subparsers, format_table
from hf_dpzo.privacy.ledger import round_up
from hf_dpzo.privacy.planning import WHOLE, CurvePoint, Plan, account_for_plan, check_group
from hf_dpzo.privacy.queries import QUERIES


def add_command(commands: Subparsers) -> None:
    """Add both commands."""
    epsilon = commands.add_parser("epsilon", help="what a noise multiplier guarantees")
    epsilon.add_argument(
        "--noise_multiplier",
        type=float,
        required=True,
        help="noise scale over the sensitivity: clip norms; for zoso and zopo sqrt(K) of them",
    )
    epsilon.add_argument(
        "--rows_per_person", type=int, default=1, help="state it for people with so many rows, which are all protected"
    )
    _add_plan_flags(epsilon)
    add_curve_flags(epsilon, against=(*WHOLE, "noise_multiplier"), shown="epsilon")
    epsilon.set_defaults(run=_epsilon, target_epsilon=None)
    noise = commands.add_parser("calibrate", help="the noise multiplier that a guarantee asks for")
    noise.add_argument("--target_epsilon", type=float, required=True, help="with --noise laplace pure: for delta 0")
    _add_plan_flags(noise)
    add_curve_flags(noise, against=(*WHOLE, "target_epsilon"), shown="the noise multiplier")
    noise.set_defaults(run=_run_calibrate, noise_multiplier=None)


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--noise", choices=list(QUERIES), default="gaussian", help="laplace, for dpzo: pure epsilon, too"
    )
    parser.add_argument("--target_delta", type=float, required=True, help="well below one over the rows")
    parser.add_argument("--num_rows", type=int, required=True, help="rows of training data")
    parser.add_argument("--expected_batch_size", type=int, required=True, help="rows in a batch on average")
    parser.add_argument("--max_steps", type=int, required=True, help="steps of the whole run")


def _epsilon(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    plan, rows = _build_plan(arguments), arguments.rows_per_person
    check_group(rows)
    if rows > 1 and arguments.against is not None:
        raise ValueError(f"rows_per_person={rows}: a curve is for people with one row; leave it out, or against.")
    curve = write_curve(arguments, plan)
    point = account_for_plan(plan)
    return Outcome(text=format_table([*_lines(point, _describe_group(point, rows)), *curve]))


def _describe_group(point: CurvePoint, rows: int) -> list[tuple[str, str]]:
    if rows == 1:
        return []
    pure = "epsilon" if point.guarantee.pure is None else "pure epsilon"
    return [(f"{pure} of {rows} rows of a person", f"{round_up(point.group_epsilon(rows)):g}")]


def _run_calibrate(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    plan = _build_plan(arguments)
    curve = write_curve(arguments, plan)
    return Outcome(text=format_table([*_lines(account_for_plan(plan)), *curve]))


def _build_plan(arguments: argparse.Namespace) -> Plan:
    return Plan(
        noise=arguments.noise,
        noise_multiplier=arguments.noise_multiplier,
        target_epsilon=arguments.target_epsilon,
        target_delta=arguments.target_delta,
        num_rows=arguments.num_rows,
        expected_batch_size=arguments.expected_batch_size,
        max_steps=arguments.max_steps,
    )


def _lines(point: CurvePoint, group_lines: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    spent = point.guarantee
    return [
        ("epsilon", f"{round_up(spent.epsilon):g}"),
        ("delta", f"{spent.delta:g}"),
        *([] if spent.pure is None else [("pure epsilon", f"{round_up(spent.pure):g} (delta 0)")]),
        *group_lines,
        ("noise multiplier", f"{point.query.noise_multiplier:.6g}"),
        ("sampling rate", f"{point.query.sampling_rate:.6g}"),
        ("steps", str(point.plan.max_steps)),
        ("neighbouring data sets", "differ by one row, added or removed"),
    ]
