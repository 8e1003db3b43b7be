"""The command line, `hf-dpzo`: puts the commands together, and makes errors into one sentence."""

import argparse
import sys
from collections.abc import Sequence

from hf_dpzo.cli import audit, calibrate, card, epsilon, push_log, replay, train, verify
from hf_dpzo.cli.output import make_printable
from hf_dpzo.privacy.ledger import BudgetExceededError


# In the order of `hf-dpzo --help`.
COMMANDS = (train, epsilon, calibrate, replay, card, verify, push_log, audit)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    2, with one sentence on standard error, is for bad input, and 130 for a command that was stopped. Any other is the
    command's own: 0 where all is well, 1 where a claim does not hold, 3 where it could not be checked.
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
    # Whether flags that a command does not know are fields of its recipe.
    parser.set_defaults(takes_fields=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_command(commands)
    return parser
