"""The command line: `hf-dpzo train`, `epsilon`, `calibrate` and `audit`."""

import argparse
import math
import sys
import time
from collections.abc import Sequence

from hf_dpzo.accounting import guarantee
from hf_dpzo.calibration import calibrate
from hf_dpzo.ledger import BudgetExceededError, round_up
from hf_dpzo.queries import GaussianQuery, LaplaceQuery


QUERIES = {"gaussian": GaussianQuery, "laplace": LaplaceQuery}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status: 2, and one sentence on standard error, for bad input."""
    arguments, flags = _parser().parse_known_args(argv)
    try:
        if flags and arguments.run is not _train:
            raise ValueError(f"{flags[0]}: there is no such option; see hf-dpzo {arguments.command} --help.")
        sys.stdout.write(arguments.run(arguments, flags))
    except (ValueError, OSError, BudgetExceededError) as error:
        sys.stderr.write(f"hf-dpzo: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dpzo", description="Differentially private zeroth-order fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="fine-tune a model", add_help=False)
    train.add_argument("recipe", nargs="?", help="a YAML file; --help lists its fields, each of which is a flag too")
    train.set_defaults(run=_train)
    epsilon = commands.add_parser("epsilon", help="what a noise multiplier guarantees")
    epsilon.add_argument("--noise_multiplier", type=float, required=True, help="noise over clip norm")
    epsilon.set_defaults(run=_epsilon)
    noise = commands.add_parser("calibrate", help="the noise multiplier that a guarantee asks for")
    noise.add_argument("--target_epsilon", type=float, required=True)
    noise.set_defaults(run=_calibrate)
    audit = commands.add_parser("audit", help="attack what is claimed, and what is not")
    audit.add_argument("--demo", choices=["inherent-privacy"], required=True, help="do random directions hide data?")
    audit.set_defaults(run=_audit)
    for command in (epsilon, noise):
        command.add_argument("--noise", choices=list(QUERIES), default="gaussian", help="laplace: for dpzo")
        command.add_argument("--target_delta", type=float, required=True)
        command.add_argument("--num_rows", type=int, required=True, help="rows of training data")
        command.add_argument("--expected_batch_size", type=int, required=True)
        command.add_argument("--max_steps", type=int, required=True)
    return parser


def _train(arguments: argparse.Namespace, flags: Sequence[str]) -> str:
    # Transformers takes seconds to import, and planning needs none of it.
    from hf_dpzo.recipe import help_text, read_recipe
    from hf_dpzo.running import run_recipe

    if {"-h", "--help"} & set(flags):
        return help_text()
    if arguments.recipe is None:
        raise ValueError("recipe: missing; name a YAML file, such as recipes/quickstart.yaml.")
    recipe, args = read_recipe(arguments.recipe, flags)
    started = time.perf_counter()
    rows = run_recipe(recipe, args)
    return _table([*rows, ("seconds, all in all", f"{time.perf_counter() - started:.0f}")])


def _audit(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    from hf_dpzo.audit import TRIALS, inherent_privacy

    lines = [("directions", "noise", "the attacker sees", "guesses right", "allowed")]
    for finding in inherent_privacy():
        lines.append(
            (
                finding.directions,
                "none" if finding.epsilon is None else f"epsilon = {finding.epsilon:g}",
                "weights and direction" if finding.knows_direction else "weights alone",
                f"{100 * finding.accuracy:.1f} % +- {100 / math.sqrt(2 * TRIALS):.1f}",
                "no bound" if finding.allowed is None else f"{100 * finding.allowed:.1f} %",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = f"One step, on one of two data sets that differ by a row. On which? {2 * TRIALS} guesses each."
    return "\n".join([title, "", *rows, ""])


def _query(arguments: argparse.Namespace, noise_multiplier: float) -> GaussianQuery | LaplaceQuery:
    if not 0 < arguments.expected_batch_size <= arguments.num_rows:
        raise ValueError(
            f"expected_batch_size={arguments.expected_batch_size}: with {arguments.num_rows} rows "
            "it must lie between 1 and that."
        )
    if arguments.max_steps < 1:
        raise ValueError(f"max_steps={arguments.max_steps}: there must be at least one step.")
    return QUERIES[arguments.noise](
        noise_multiplier=noise_multiplier, sampling_rate=arguments.expected_batch_size / arguments.num_rows
    )


def _epsilon(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    return _plan(arguments, _query(arguments, arguments.noise_multiplier))


def _calibrate(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    query = calibrate(
        _query(arguments, 1.0),
        steps=arguments.max_steps,
        target_epsilon=arguments.target_epsilon,
        target_delta=arguments.target_delta,
    )
    return _plan(arguments, query)


def _plan(arguments: argparse.Namespace, query: GaussianQuery | LaplaceQuery) -> str:
    spent = guarantee(((query, arguments.max_steps),), delta=arguments.target_delta)
    return _table(
        [
            ("epsilon", f"{round_up(spent.epsilon):g}"),
            ("delta", f"{spent.delta:g}"),
            *([] if spent.pure is None else [("pure epsilon", f"{round_up(spent.pure):g} (delta 0)")]),
            ("noise multiplier", f"{query.noise_multiplier:.6g}"),
            ("sampling rate", f"{query.sampling_rate:.6g}"),
            ("steps", str(arguments.max_steps)),
            ("neighbouring data sets", "differ by one row, added or removed"),
        ]
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in rows)
