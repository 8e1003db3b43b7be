"""The commands, from the parser that `hf-dpzo` itself uses."""

import argparse
from collections.abc import Iterator

from hf_dpzo.cli.main import COMMANDS, build_parser

from sections.markdown import code, plain, table


# What `--help` prints is broken at the width of a page.
_WIDTH = 84


def build_cli() -> str:
    """Return a section for each command: what it does, how it is called, and its options."""
    parser = build_parser([*COMMANDS])
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return "\n".join("".join(_describe(name, commands.choices[name])) for name in COMMANDS)


def _describe(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    purpose = COMMANDS[name]
    yield f"## `hf-dpzo {name}`\n\n{plain(purpose[0].upper() + purpose[1:])}.\n\n"
    command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=_WIDTH)
    yield f"```text\n{command.format_usage().strip()}\n```\n\n"
    if command.get_default("takes_fields"):
        yield (
            "Each [field of a recipe](recipe-fields.md) and each [training argument](arguments.md) is an option, too, "
            "and `--without NAME,NAME` leaves fields of the recipe out.\n\n"
        )
    for group in command._action_groups:
        rows = [_describe_option(action) for action in group._group_actions if action.help != argparse.SUPPRESS]
        if rows:
            yield f"{plain(group.description[0].upper() + group.description[1:])}:\n\n" if group.description else ""
            yield f"{table(['option', 'what it is'], rows)}\n"


def _describe_option(action: argparse.Action) -> list[str]:
    text = f"{plain(action.help).rstrip('.')}." if action.help else ""
    if action.choices:
        text += f" One of {', '.join(code(choice) for choice in action.choices)}."
    is_shown = action.default not in (None, False, argparse.SUPPRESS) and action.nargs != 0
    if is_shown:
        text += f" Default {code(action.default)}."
    names = ", ".join(code(name) for name in action.option_strings) or code(action.metavar or action.dest)
    return [f"{names}{' (required)' if action.option_strings and action.required else ''}", text.strip()]
