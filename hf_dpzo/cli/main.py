"""The command line `hf-dpzo`: combines the commands, and turns each error into one sentence."""

import argparse
import sys
from collections.abc import Sequence

from hf_dpzo.cli import (
    audit,
    calibrate,
    card,
    epsilon,
    evaluate,
    export,
    generate,
    merge,
    predict,
    push_log,
    replay,
    train,
    verify,
)
from hf_dpzo.cli.output import make_printable
from hf_dpzo.privacy.ledger import BudgetExceededError


# In the order of `hf-dpzo --help`.
COMMANDS = (
    train,
    predict,
    generate,
    evaluate,
    merge,
    export,
    epsilon,
    calibrate,
    replay,
    card,
    verify,
    push_log,
    audit,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    The status is 2 for bad input, with one sentence on standard error, and 130 for a command that was interrupted. Else
    it is the command's own: 0 if all is well, 1 if a claim does not hold, 3 if it could not be checked.
    """
    arguments, fields = _build_parser().parse_known_args(argv)
    try:
        if fields and not arguments.takes_fields:
            raise ValueError(f"{fields[0]}: there is no such option; see hf-dpzo {arguments.command} --help.")
        outcome = arguments.run(arguments, fields)
        sys.stdout.write(outcome.text)
    except (ValueError, OSError, BudgetExceededError) as error:
        sys.stderr.write(f"hf-dpzo: {make_printable(str(error))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("hf-dpzo: stopped; --resume_from_checkpoint true goes on with the steps that were taken.\n")
        return 130
    return outcome.status


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dpzo", description="Differentially private zeroth-order fine-tuning.")
    # Whether flags that the command does not define are fields of its recipe.
    parser.set_defaults(takes_fields=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_command(commands)
    return parser
