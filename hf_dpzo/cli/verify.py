"""`hf-dpzo verify`: check what a published model says of its privacy."""

import argparse
import sys
from collections.abc import Sequence

from hf_dpzo.cli.output import Outcome, Subparsers, format_table, make_printable


# More than any model has.
MOST_GIB = 1e6


VERDICTS = {True: "holds", False: "FAILS", None: "not checked"}


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "verify", help="compute a model's epsilon again from its log, replay its weights, and compare"
    )
    parser.add_argument("model", help="a folder, or user/model on the Hub")
    parser.add_argument("--base", help="where the base model is; by default where the log says")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--without-weights", "--without_weights", action="store_true", help="load no model, and replay nothing"
    )
    parser.add_argument(
        "--max-download",
        "--max_download",
        type=float,
        default=2.0,
        metavar="GIB",
        help="the most that is downloaded of a base model because the log names it, in GiB; by default 2",
    )
    parser.set_defaults(run=_run)


def _announce(sentence: str) -> None:
    sys.stderr.write(f"hf-dpzo: {make_printable(sentence)}\n")


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.verification.verify import verify

    if not 0 <= arguments.max_download <= MOST_GIB:
        raise ValueError(
            f"max_download={arguments.max_download:g}: it is a number of GiB from 0 to {MOST_GIB:g}; correct it."
        )
    findings = verify(
        arguments.model,
        base=arguments.base,
        revision=arguments.revision,
        weights=not arguments.without_weights,
        max_download=int(arguments.max_download * (1 << 30)),
        announce=_announce,
    )
    lines = format_table([(finding.name, VERDICTS[finding.holds], finding.detail) for finding in findings])
    if any(finding.holds is False for finding in findings):
        return Outcome(text=f"{lines}\nSomething does not hold: do not rely on what the card says.\n", status=1)
    if arguments.without_weights or any(finding.holds is None for finding in findings):
        return Outcome(text=f"{lines}\nNothing failed, but not everything could be checked.\n", status=3)
    return Outcome(text=f"{lines}\nEverything holds.\n")
