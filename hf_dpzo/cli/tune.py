"""`hf-dpzo tune`: propose smoothing, clip norm and learning rate of a recipe by public rows."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("tune", help="propose the numbers of a recipe by public rows")
    parser.add_argument("recipe", help="a YAML file; any flag that train takes replaces a field of it")
    parser.add_argument("--public", help="a file of public rows in the recipe's format; by default rows are made up")
    parser.add_argument("--output", help="write the proposed recipe into this new file; by default it is printed")
    parser.set_defaults(run=_run, takes_fields=True)


def _run(arguments: argparse.Namespace, fields: Sequence[str]) -> Outcome:
    from hf_dpzo.plots import check_output_path
    from hf_dpzo.recipe.tuning import tune, write_proposals

    if arguments.output is not None:
        check_output_path(Path(arguments.output), flag="output")
        if Path(arguments.output).exists():
            raise ValueError(f"output={arguments.output}: the file exists; name a new one.")
    proposals = tune(arguments.recipe, fields, public=arguments.public)
    if arguments.public is None:
        sys.stderr.write(
            "hf-dpzo: without --public, rows are made up; numbers from them are a beginning, to be tried\n"
        )
    text = write_proposals(arguments.recipe, fields, proposals)
    if arguments.output is None:
        return Outcome(text=text)
    Path(arguments.output).write_text(text, encoding="utf-8")
    lines = [(one.name, f"{one.value:g}", one.reason) for one in proposals]
    return Outcome(text=format_table([*lines, ("recipe", arguments.output, "")]))
