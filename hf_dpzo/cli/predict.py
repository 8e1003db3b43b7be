"""`hf-dpzo predict`: ask a trained model for the class, the number or the words of rows."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.asking import add_row_flags, ask_rows
from hf_dpzo.cli.output import Outcome, Subparsers


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("predict", help="ask a trained model for the classes of rows, or what it learned")
    add_row_flags(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    return ask_rows(arguments, lambda model, rows: model.predict(rows, batch_size=arguments.batch_size))
