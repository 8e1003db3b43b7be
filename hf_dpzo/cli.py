"""The command line: `hf-dpzo train`, `replay`, `epsilon`, `calibrate` and `audit`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.accounting import LARGEST_GROUP, check_delta, check_promise, group_epsilon, guarantee
from hf_dpzo.calibration import calibrate
from hf_dpzo.ledger import BudgetExceededError, round_up
from hf_dpzo.queries import QUERIES, GaussianQuery, LaplaceQuery


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    2, with one sentence on standard error, is for bad input, and 1 for an audit that found more than is claimed.
    """
    arguments, flags = _parser().parse_known_args(argv)
    try:
        if flags and arguments.run not in (_train, _audit):
            raise ValueError(f"{flags[0]}: there is no such option; see hf-dpzo {arguments.command} --help.")
        sys.stdout.write(arguments.run(arguments, flags))
    except (ValueError, OSError, BudgetExceededError) as error:
        sys.stderr.write(f"hf-dpzo: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("hf-dpzo: stopped; --resume_from_checkpoint true goes on with the steps that were taken.\n")
        return 130
    except _ViolationError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


class _ViolationError(Exception):
    """An audit found more than is claimed."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dpzo", description="Differentially private zeroth-order fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="fine-tune a model", add_help=False)
    train.add_argument("recipe", nargs="?", help="a YAML file; --help lists its fields, each of which is a flag too")
    train.set_defaults(run=_train)
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
    epsilon.set_defaults(run=_epsilon)
    noise = commands.add_parser("calibrate", help="the noise multiplier that a guarantee asks for")
    noise.add_argument("--target_epsilon", type=float, required=True, help="with --noise laplace pure: for delta 0")
    noise.set_defaults(run=_calibrate)
    replay = commands.add_parser("replay", help="rebuild a model or an adapter from its base model and its log")
    replay.add_argument("base", help="what the run began from: a model on the Hub, a folder, or package://name")
    replay.add_argument("log", help="the folder of a run, or its trajectory.zo")
    replay.add_argument("--output", required=True, help="the folder to save to")
    replay.add_argument("--at-step", "--at_step", type=int, help="after so many steps; by default after all")
    replay.add_argument("--revision", help="branch, tag or commit of the base model on the Hub")
    replay.set_defaults(run=_replay)
    audit = commands.add_parser("audit", help="attack the mechanism that a recipe would run")
    audit.add_argument("recipe", nargs="?", help="a YAML file; its fields are flags, as in hf-dpzo train")
    audit.add_argument("--picture", help="also draw the best attacker's ROC curve, into this file")
    audit.add_argument("--demo", choices=["inherent-privacy"], help="instead: do random directions hide data?")
    audit.set_defaults(run=_audit)
    for command in (epsilon, noise):
        command.add_argument(
            "--noise", choices=list(QUERIES), default="gaussian", help="laplace, for dpzo: pure epsilon, too"
        )
        command.add_argument("--target_delta", type=float, required=True, help="well below one over the rows")
        command.add_argument("--num_rows", type=int, required=True, help="rows of training data")
        command.add_argument("--expected_batch_size", type=int, required=True, help="rows in a batch on average")
        command.add_argument("--max_steps", type=int, required=True, help="steps of the whole run")
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


def _replay(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    from hf_dpzo.replay import rebuild
    from hf_dpzo.trajectory import LOG_FILE, Trajectory

    log = Trajectory.read(arguments.log)
    if (Path(arguments.output) / LOG_FILE).exists():
        raise ValueError(f"output={arguments.output}: it holds the log of a run, and maybe its weights; name another.")
    model = rebuild(arguments.base, arguments.log, at_step=arguments.at_step, revision=arguments.revision)
    model.save_pretrained(arguments.output)
    steps = len(log.records) if arguments.at_step is None else arguments.at_step
    return _table(
        [
            ("steps replayed", f"{steps} of {len(log.records)}, planned {log.header['plan']['steps']}"),
            ("bytes of a step", str(log.layout.size)),
            ("saved to", arguments.output),
        ]
    )


def _audit(arguments: argparse.Namespace, flags: Sequence[str]) -> str:
    if arguments.demo is not None:
        return _demonstration()
    if arguments.recipe is None:
        raise ValueError("recipe: missing; name a YAML file, such as recipes/quickstart.yaml, or --demo.")
    from hf_dpzo.audit import audit
    from hf_dpzo.loading import load_tables
    from hf_dpzo.recipe import read_recipe
    from hf_dpzo.roc import check_picture, draw

    if arguments.picture is not None:
        check_picture(Path(arguments.picture))
    recipe, args = read_recipe(arguments.recipe, flags)
    if not args.private:
        raise ValueError(f"method={args.method}: it adds no noise, so there is no claim to attack; choose another.")
    train, _ = load_tables(recipe)
    method, _ = args.plan(len(args.units(train)))
    found = audit(method, seed=args.seed)
    if arguments.picture is not None:
        draw(found, Path(arguments.picture))
    verdicts = {True: "ok", False: "VIOLATED"}
    checks = [(check.name, check.measured, check.allowed, verdicts[check.passed]) for check in found.checks]
    end = f"One release at sampling rate 1; {found.releases} in each of the two worlds of each attack."
    text = f"{_table([('check', 'measured', 'allowed', ''), *checks])}\n{end}\n"
    if not found.passed:
        raise _ViolationError(text)
    return text


def _demonstration() -> str:
    from hf_dpzo.inherent import inherent_privacy

    lines = [("directions", "noise", "the attacker sees", "guesses right", "allowed")]
    for finding in inherent_privacy():
        lines.append(
            (
                finding.directions,
                "none" if finding.epsilon is None else f"epsilon = {finding.epsilon:g}",
                "weights and direction" if finding.knows_direction else "weights alone",
                f"{100 * finding.accuracy:.1f} % +- {100 * finding.two_standard_errors:.1f}",
                "no bound" if finding.allowed is None else f"{100 * finding.allowed:.1f} %",
            )
        )
    title = f"One step, on one of two data sets that differ by a row. On which? {finding.guesses} guesses each."
    end = "+- is two standard errors. The attack on noise is the best there is: but for chance, it meets the bound."
    return f"{title}\n\n{_table(lines)}\n{end}\n"


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
    query, rows = _query(arguments, arguments.noise_multiplier), arguments.rows_per_person
    if not 1 <= rows <= LARGEST_GROUP:
        raise ValueError(f"rows_per_person={rows}: it must lie between 1 and {LARGEST_GROUP}.")
    if rows == 1:
        return _plan(arguments, query)
    together = group_epsilon(((query, arguments.max_steps),), size=rows, delta=arguments.target_delta)
    pure = "pure epsilon" if isinstance(query, LaplaceQuery) else "epsilon"
    return _plan(arguments, query, (f"{pure} of {rows} rows of a person", f"{round_up(together):g}"))


def _calibrate(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    query = calibrate(
        _query(arguments, 1.0),
        steps=arguments.max_steps,
        target_epsilon=arguments.target_epsilon,
        target_delta=arguments.target_delta,
    )
    return _plan(arguments, query)


def _plan(arguments: argparse.Namespace, query: GaussianQuery | LaplaceQuery, *more: tuple[str, str]) -> str:
    check_delta(arguments.target_delta, num_rows=arguments.num_rows)
    spent = guarantee(((query, arguments.max_steps),), delta=arguments.target_delta)
    check_promise(spent)
    return _table(
        [
            ("epsilon", f"{round_up(spent.epsilon):g}"),
            ("delta", f"{spent.delta:g}"),
            *([] if spent.pure is None else [("pure epsilon", f"{round_up(spent.pure):g} (delta 0)")]),
            *more,
            ("noise multiplier", f"{query.noise_multiplier:.6g}"),
            ("sampling rate", f"{query.sampling_rate:.6g}"),
            ("steps", str(arguments.max_steps)),
            ("neighbouring data sets", "differ by one row, added or removed"),
        ]
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)
