"""`hf-dpzo verify`: is it true what a published model says of its privacy?"""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


VERDICTS = {True: "holds", False: "FAILS", None: "not checked"}


def add_command(commands: Subparsers) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "verify", help="compute a model's epsilon again from its log, replay its weights, and compare"
    )
    parser.add_argument("model", help="a folder, or user/model on the Hub")
    parser.add_argument("--base", help="where the base model is; by default where the log says")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--without-weights", "--without_weights", action="store_true", help="load no model, and replay nothing"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.verification.verify import verify

    findings = verify(
        arguments.model,
        base=arguments.base,
        revision=arguments.revision,
        weights=not arguments.without_weights,
    )
    lines = format_table([(one.name, VERDICTS[one.holds], one.detail) for one in findings])
    if any(one.holds is False for one in findings):
        return Outcome(text=f"{lines}\nSomething does not hold: do not rely on what the card says.\n", status=1)
    if arguments.without_weights or any(one.holds is None for one in findings):
        return Outcome(text=f"{lines}\nNothing failed, but not everything could be checked.\n", status=3)
    return Outcome(text=f"{lines}\nEverything holds.\n")
