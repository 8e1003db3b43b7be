"""What `hf-dpzo epsilon` and `hf-dpzo calibrate` share: the flags of a plan, and the lines that describe one."""

import argparse
from collections.abc import Sequence

from hf_dpzo.privacy.planning import CurvePoint, Plan
from hf_dpzo.privacy.queries import QUERIES
from hf_dpzo.privacy.rounding import round_up


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a plan to `parser`, without the one that sets its noise."""
    parser.add_argument(
        "--noise", choices=list(QUERIES), default="gaussian", help="laplace, for dpzo: pure epsilon, too"
    )
    parser.add_argument("--target_delta", type=float, required=True, help="well below one over the rows")
    parser.add_argument("--num_rows", type=int, required=True, help="rows of training data")
    parser.add_argument("--expected_batch_size", type=int, required=True, help="rows in a batch on average")
    parser.add_argument("--max_steps", type=int, required=True, help="steps of the whole run")


def build_plan(arguments: argparse.Namespace) -> Plan:
    """Build the plan that the flags describe."""
    return Plan(
        noise=arguments.noise,
        noise_multiplier=arguments.noise_multiplier,
        target_epsilon=arguments.target_epsilon,
        target_delta=arguments.target_delta,
        num_rows=arguments.num_rows,
        expected_batch_size=arguments.expected_batch_size,
        max_steps=arguments.max_steps,
    )


def describe_point(point: CurvePoint, group_lines: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Return lines with the guarantee of a plan, then `group_lines`, then what it follows from."""
    guarantee = point.guarantee
    return [
        ("epsilon", f"{round_up(guarantee.epsilon):g}"),
        ("delta", f"{guarantee.delta:g}"),
        *([] if guarantee.pure is None else [("pure epsilon", f"{round_up(guarantee.pure):g} (delta 0)")]),
        *group_lines,
        ("noise multiplier", f"{point.query.noise_multiplier:.6g}"),
        ("sampling rate", f"{point.query.sampling_rate:.6g}"),
        ("steps", str(point.plan.max_steps)),
        ("neighbouring data sets", "differ by one row, added or removed"),
    ]
