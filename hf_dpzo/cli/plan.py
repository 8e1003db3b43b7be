"""`hf-dpzo plan`: what the run of a recipe will promise, cost and take."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("plan", help="what a recipe's run will promise, cost and take")
    parser.add_argument("recipe", help="a YAML file; any flag that train takes replaces a field of it")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--picture", help="draw it into this file: .png, .svg or .pdf")
    parser.set_defaults(run=_run, takes_fields=True)


def _run(arguments: argparse.Namespace, fields: Sequence[str]) -> Outcome:
    from hf_dpzo.plots import check_picture_path, draw_plan
    from hf_dpzo.recipe.planning import plan

    if arguments.picture is not None:
        check_picture_path(Path(arguments.picture))
    planned = plan(arguments.recipe, fields)
    if arguments.picture is not None:
        draw_plan(planned.as_json(), Path(arguments.picture))
    text = f"{json.dumps(planned.as_json(), indent=2)}\n" if arguments.json else format_table(planned.as_lines())
    return Outcome(text=text, status=1 if planned.refusals else 0)
