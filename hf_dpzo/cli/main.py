"""The command line `hf-dpzo`: combines the commands, and turns each error into one sentence."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from hf_dpzo._version import __version__
from hf_dpzo.cli.output import make_printable
from hf_dpzo.cli.quiet import quiet_warnings


# In the order of `hf-dpzo --help`. A command's module is imported when the command is called, because that takes time.
COMMANDS = {
    "plan": "what a recipe's run will promise, cost and take",
    "tune": "propose the numbers of a recipe by public rows",
    "train": "fine-tune a model",
    "predict": "ask a trained model for the classes of rows, or what it learned",
    "generate": "let a trained model write after rows or texts",
    "evaluate": "measure a trained model on labelled rows",
    "merge": "write an adapter into the weights of its base model",
    "export": "write a trained model with the base model that it needs",
    "epsilon": "what a noise multiplier guarantees",
    "calibrate": "the noise multiplier that a guarantee asks for",
    "replay": "rebuild a model or an adapter from its base model and its log",
    "card": "write README.md and privacy.json of a run anew, from its log",
    "verify": "compute a model's epsilon again from its log, replay its weights, and compare",
    "push-log": "publish a private model as its log, without weights",
    "audit": "attack the mechanism that a recipe would run, or a run with canaries",
    "ledger": "what all runs on the same rows have spent, and their budget",
    "recipe": "show the recipes that come with the library, or copy one",
    "completion": "write a script by which a shell completes commands and flags",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    The status is 2 for bad input, with one sentence on standard error, and 130 for a command that was interrupted. Else
    it is the command's own: 0 if all is well, 1 if a claim does not hold, 3 if it could not be checked.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    called = next((argument for argument in argv if not argument.startswith("-")), None)
    arguments, fields = build_parser([called]).parse_known_args(argv)
    try:
        if fields and not arguments.takes_fields:
            raise ValueError(f"{fields[0]}: there is no such option; see hf-dpzo {arguments.command} --help.")
        _refuse_missing_recipe(arguments, fields)
        with quiet_warnings():
            outcome = arguments.run(arguments, fields)
        sys.stdout.write(outcome.text)
    except Exception as error:
        sentence = _find_sentence(error)
        if sentence is None:
            raise
        sys.stderr.write(f"hf-dpzo: {make_printable(' '.join(sentence.split()))}\n")
        return 2
    except KeyboardInterrupt as stop:  # A command may have said what can be done now.
        sys.stderr.write(f"hf-dpzo: {make_printable(str(stop)) or 'stopped'}.\n")
        return 130
    return outcome.status


def _refuse_missing_recipe(arguments: argparse.Namespace, fields: Sequence[str]) -> None:
    """Raise `ValueError` for a recipe that is no file, before libraries are imported for seconds."""
    if arguments.takes_fields and arguments.recipe is not None and not {"-h", "--help"} & {*fields}:
        from hf_dpzo.recipe.shipped import locate_recipe

        locate_recipe(arguments.recipe)


def _find_sentence(error: Exception) -> str | None:
    """Return what is said of an error; `None` for one that only its traceback explains.

    Libraries that raise other errors are imported by then, if a command has used them.
    """
    if type(error).__module__.startswith(("httpx", "huggingface_hub")):
        from hf_dpzo.models.hub import HUB_ERRORS, explain_hub_error

        if isinstance(error, HUB_ERRORS):
            return f"Hub: {explain_hub_error(error, writes=False)}."
    if isinstance(error, RuntimeError):
        from hf_dpzo.privacy.ledger import BudgetExceededError

        return str(error) if isinstance(error, BudgetExceededError) else None
    return str(error) if isinstance(error, (ValueError, OSError)) else None


def build_parser(called: Sequence[str | None]) -> argparse.ArgumentParser:
    """Return the parser of all commands; only those that are `called` have flags."""
    parser = argparse.ArgumentParser(prog="hf-dpzo", description="Differentially private zeroth-order fine-tuning.")
    parser.add_argument("--version", action="version", version=f"hf-dpzo {__version__}")
    # Whether flags that the command does not define are fields of its recipe.
    parser.set_defaults(takes_fields=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in COMMANDS.items():
        if name in called:
            importlib.import_module(f"hf_dpzo.cli.{name.replace('-', '_')}").add_command(commands)
        else:
            commands.add_parser(name, help=description)
    return parser
