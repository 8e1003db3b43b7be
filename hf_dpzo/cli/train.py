"""`hf-dpzo train`: fine-tune the model that a recipe names."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("train", help="fine-tune a model", add_help=False)
    parser.add_argument("recipe", nargs="?", help="a YAML file; --help lists its fields, each of which is a flag too")
    parser.set_defaults(run=_run, takes_fields=True)


def _run(arguments: argparse.Namespace, fields: Sequence[str]) -> Outcome:
    from hf_dpzo.recipe.help import format_help
    from hf_dpzo.recipe.recipe import read_recipe
    from hf_dpzo.recipe.run import run_recipe

    if {"-h", "--help"} & set(fields):
        return Outcome(text=format_help())
    if arguments.recipe is None:
        raise ValueError("recipe: missing; name a YAML file, such as recipes/quickstart.yaml.")
    recipe, args = read_recipe(arguments.recipe, fields)
    started = time.perf_counter()
    try:
        rows = run_recipe(recipe, args, announce=_announce if args.process_index == 0 else None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_describe_stop(Path(args.output_dir))) from None
    if not rows:
        return Outcome(text="")
    return Outcome(text=format_table([*rows, ("seconds, all in all", f"{time.perf_counter() - started:.0f}")]))


def _announce() -> None:
    sys.stderr.write("hf-dpzo: loading the model; then made-up rows are tried, before any private one is evaluated\n")


def _describe_stop(folder: Path) -> str:
    """Return what can be done after a run in `folder` was interrupted."""
    from hf_dpzo.trajectory.log import LOG_FILE

    if not (folder / LOG_FILE).is_file():
        return "stopped before the first step"
    return "stopped; --resume_from_checkpoint true goes on with the steps that were taken"
