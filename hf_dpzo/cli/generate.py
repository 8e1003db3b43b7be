"""`hf-dpzo generate`: let a trained model write after the rows of a file, or after texts."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.asking import add_row_flags, ask_rows
from hf_dpzo.cli.output import Outcome, Subparsers


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("generate", help="let a trained model write after rows or texts")
    add_row_flags(parser)
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, help="of an answer, at most; default the recipe's, or 64"
    )
    parser.add_argument("--temperature", type=float, help="sample at it; by default the most probable token is taken")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    return ask_rows(
        arguments,
        lambda model, rows: model.generate(
            rows,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            batch_size=arguments.batch_size,
        ),
    )
