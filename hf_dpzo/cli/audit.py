"""`hf-dpzo audit`: attack the mechanism that a recipe would use, or a run; or show that directions hide nothing."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dpzo.cli.output import Outcome, Subparsers, format_table
from hf_dpzo.privacy.rounding import round_up


if TYPE_CHECKING:
    from hf_dpzo.auditing.audit import Audit
    from hf_dpzo.auditing.run_audit import RunAudit


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("audit", help="attack the mechanism that a recipe would run, or a run with canaries")
    parser.add_argument("recipe", nargs="?", help="a YAML file; its fields are flags, as in hf-dpzo train")
    parser.add_argument("--picture", help="also draw what was found, such as the best attacker's ROC, into this file")
    # Not `run`, which is the function that runs the command.
    parser.add_argument(
        "--run",
        dest="folder",
        metavar="FOLDER",
        help="instead: the folder of a recipe's run with canaries, to be audited itself",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="--run: of all bounds together; default 0.95")
    parser.add_argument("--card", action="store_true", help="--run: also write what was found into its card")
    parser.add_argument("--demo", choices=["inherent-privacy"], help="instead: do random directions hide data?")
    parser.set_defaults(run=_run, takes_fields=True)


def _run(arguments: argparse.Namespace, fields: Sequence[str]) -> Outcome:
    if arguments.demo is not None:
        return Outcome(text=_run_demonstration())
    if arguments.folder is not None:
        return _audit_run(arguments, fields)
    if arguments.recipe is None:
        raise ValueError("recipe: missing; name a YAML file, such as recipes/quickstart.yaml, or --demo.")
    from hf_dpzo.auditing.audit import audit
    from hf_dpzo.auditing.roc import draw_roc
    from hf_dpzo.plots import check_picture_path
    from hf_dpzo.recipe.loading import load_tables
    from hf_dpzo.recipe.recipe import read_recipe

    if arguments.picture is not None:
        check_picture_path(Path(arguments.picture))
    recipe, args = read_recipe(arguments.recipe, fields)
    if not args.private:
        raise ValueError(f"method={args.method}: it adds no noise, so there is no claim to attack; choose another.")
    train, _ = load_tables(recipe, unit_column=args.privacy_unit_column)
    method, _ = args.plan(len(args.build_units(train)))
    result = audit(method, seed=args.seed)
    if arguments.picture is not None:
        draw_roc(result, Path(arguments.picture))
    return Outcome(text=_format_result(result), status=0 if result.passed else 1)


def _format_result(result: "Audit") -> str:
    verdicts = {True: "ok", False: "VIOLATED"}
    checks = [(check.name, check.measured, check.allowed, verdicts[check.passed]) for check in result.checks]
    end = f"One release at sampling rate 1; {result.releases} in each of the two worlds of each attack."
    return f"{format_table([('check', 'measured', 'allowed', ''), *checks])}\n{end}\n"


def _audit_run(arguments: argparse.Namespace, fields: Sequence[str]) -> Outcome:
    from hf_dpzo.recipe.run import rebuild_trainer

    if arguments.recipe is not None:
        raise ValueError(
            f"recipe={arguments.recipe}: a run keeps its own recipe; leave this out, and write fields as --name=value."
        )
    trainer = rebuild_trainer(Path(arguments.folder), fields)
    found = trainer.audit_run(confidence=arguments.confidence, card=arguments.card, picture=arguments.picture)
    return Outcome(text=_format_found(found), status=1 if found.exceeds_claim else 0)


def _format_found(found: "RunAudit") -> str:
    shown = found.as_json()
    at = f"at delta = {found.delta:g}"
    rows = [
        ("canaries", f"{found.canaries}, of which {found.included} were in"),
        ("a canary's part of a step", f"{found.strength:.2f} clip norms on average; 1 is the most"),
        ("steps replayed", str(found.steps)),
        ("guesses", f"{found.guesses}, of which {found.correct} are right"),
        ("epsilon, at least, from guesses alone", f"{shown['from_guesses_alone']:g}"),
        ("epsilon, at least, from guesses", f"{shown['from_guesses']:g}"),
        ("epsilon, at least, from the spread", f"{shown['from_spread']:g}"),
        ("epsilon, at least", f"{shown['epsilon_lower']:g} {at}, with {found.confidence:.0%} confidence"),
        ("epsilon, claimed", f"{round_up(found.epsilon_claimed):g} {at}"),
        ("chance of this, if the claim holds", f"{found.chance:.2g} at most"),
    ]
    verdict = "MORE than the claim allows" if found.exceeds_claim else "nothing beyond the claim; that is no proof"
    return format_table([*rows, ("found", verdict)])


def _run_demonstration() -> str:
    from hf_dpzo.auditing.inherent_privacy import attack_inherent_privacy

    lines = [("directions", "noise", "the attacker sees", "guesses right", "allowed")]
    for finding in attack_inherent_privacy():
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
    return f"{title}\n\n{format_table(lines)}\n{end}\n"
