"""`hf-dpzo epsilon`: state what a noise multiplier guarantees, without a model."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.curves import add_curve_flags, write_curve
from hf_dpzo.cli.output import Outcome, Subparsers, format_table
from hf_dpzo.cli.planning import add_plan_flags, build_plan, describe_point
from hf_dpzo.privacy.planning import WHOLE, CurvePoint, account_for_plan, check_group
from hf_dpzo.privacy.rounding import round_up


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("epsilon", help="what a noise multiplier guarantees")
    parser.add_argument(
        "--noise_multiplier",
        type=float,
        required=True,
        help="noise scale over the sensitivity: clip norms; for zoso and zopo sqrt(K) of them",
    )
    parser.add_argument(
        "--rows_per_person", type=int, default=1, help="state it for people with so many rows, which are all protected"
    )
    add_plan_flags(parser)
    add_curve_flags(parser, against=(*WHOLE, "noise_multiplier"), shown="epsilon")
    parser.set_defaults(run=_run, target_epsilon=None)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    plan = build_plan(arguments)
    rows = arguments.rows_per_person
    check_group(rows)
    if rows > 1 and arguments.against is not None:
        raise ValueError(f"rows_per_person={rows}: a curve is for people with one row; leave it out, or against.")
    curve = write_curve(arguments, plan)
    point = account_for_plan(plan)
    return Outcome(text=format_table([*describe_point(point, _describe_group(point, rows)), *curve]))


def _describe_group(point: CurvePoint, rows: int) -> list[tuple[str, str]]:
    if rows == 1:
        return []
    pure = "epsilon" if point.guarantee.pure is None else "pure epsilon"
    return [(f"{pure} of {rows} rows of a person", f"{round_up(point.group_epsilon(rows)):g}")]
