"""`hf-dpzo audit`: attack the mechanism that a recipe would run, or show that random directions hide nothing."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


if TYPE_CHECKING:
    from hf_dpzo.auditing.audit import Audit


def add_command(commands: Subparsers) -> None:
    """Add the command."""
    parser = commands.add_parser("audit", help="attack the mechanism that a recipe would run")
    parser.add_argument("recipe", nargs="?", help="a YAML file; its fields are flags, as in hf-dpzo train")
    parser.add_argument("--picture", help="also draw the best attacker's ROC curve, into this file")
    parser.add_argument("--demo", choices=["inherent-privacy"], help="instead: do random directions hide data?")
    parser.set_defaults(run=_run, takes_fields=True)


def _run(arguments: argparse.Namespace, fields: Sequence[str]) -> Outcome:
    if arguments.demo is not None:
        return Outcome(text=_run_demonstration())
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
    train, _ = load_tables(recipe)
    method, _ = args.plan(len(args.build_units(train)))
    found = audit(method, seed=args.seed)
    if arguments.picture is not None:
        draw_roc(found, Path(arguments.picture))
    return Outcome(text=_findings(found), status=0 if found.passed else 1)


def _findings(found: "Audit") -> str:
    verdicts = {True: "ok", False: "VIOLATED"}
    checks = [(check.name, check.measured, check.allowed, verdicts[check.passed]) for check in found.checks]
    end = f"One release at sampling rate 1; {found.releases} in each of the two worlds of each attack."
    return f"{format_table([('check', 'measured', 'allowed', ''), *checks])}\n{end}\n"


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
