"""`hf-dpzo recipe`: show the recipes that come with the library, or copy one."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from hf_dpzo.cli.output import Outcome, Subparsers, format_table
from hf_dpzo.recipe.shipped import find_recipe, find_recipes


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("recipe", help="show the recipes that come with the library, or copy one")
    parser.add_argument("name", nargs="?", help="the recipe to show; without it, all are listed")
    parser.add_argument("--output", help="write it into this new file instead, to be changed")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    if arguments.name is None:
        if arguments.output is not None:
            raise ValueError(f"output={arguments.output}: which recipe? Name one, such as hf-dpzo recipe quickstart.")
        return Outcome(text=format_table([(name, _summarize(path)) for name, path in find_recipes().items()]))
    text = find_recipe(arguments.name).read_text(encoding="utf-8")
    if arguments.output is None:
        return Outcome(text=text)
    try:
        with Path(arguments.output).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"output={arguments.output}: the file exists; name a new one.") from None
    return Outcome(text=format_table([("recipe", arguments.output), ("next", f"hf-dpzo train {arguments.output}")]))


def _summarize(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return f"{comment.split('. ')[0].removesuffix('.')}."
