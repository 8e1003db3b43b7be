"""`hf-dpzo completion`: write a script by which a shell completes commands and flags."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.output import Outcome, Subparsers


SHELLS = ("bash", "zsh", "tcsh")


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("completion", help="write a script by which a shell completes commands and flags")
    parser.add_argument("shell", choices=SHELLS, help='such as: eval "$(hf-dpzo completion bash)"')
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    try:
        import shtab
    except ImportError:
        raise ValueError("completion: shtab writes the script; pip install 'hf_dpzo[completion]'.") from None
    from hf_dpzo.cli.main import COMMANDS, build_parser
    from hf_dpzo.recipe.help import list_fields

    parser = build_parser([*COMMANDS])
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        if command.get_default("takes_fields"):
            known = set(command._option_string_actions)
            for _, action in list_fields():
                if not known & set(action.option_strings):
                    command._add_action(action)
    return Outcome(text=shtab.complete(parser, shell=arguments.shell) + "\n")
