"""`hf-dpzo calibrate`: find the noise multiplier that a guarantee asks for, without a model."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.curves import add_curve_flags, write_curve
from hf_dpzo.cli.output import Outcome, Subparsers, format_table
from hf_dpzo.cli.planning import add_plan_flags, build_plan, describe_point
from hf_dpzo.privacy.planning import WHOLE, account_for_plan


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("calibrate", help="the noise multiplier that a guarantee asks for")
    parser.add_argument("--target_epsilon", type=float, required=True, help="with --noise laplace pure: for delta 0")
    add_plan_flags(parser)
    add_curve_flags(parser, against=(*WHOLE, "target_epsilon"), shown="the noise multiplier")
    parser.set_defaults(run=_run, noise_multiplier=None)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    plan = build_plan(arguments)
    curve = write_curve(arguments, plan)
    return Outcome(text=format_table([*describe_point(account_for_plan(plan)), *curve]))
