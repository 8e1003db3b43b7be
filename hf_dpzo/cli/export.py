"""`hf-dpzo export`: write a trained model with its base model, for transformers, PEFT or llama.cpp."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.asking import add_place_flags, load_model
from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("export", help="write a trained model with the base model that it needs")
    add_place_flags(parser)
    parser.add_argument("--output", help="a new folder of safetensors, which PEFT and transformers open by themselves")
    parser.add_argument("--gguf", help="instead: a GGUF file, by llama.cpp's converter, if that is installed")
    parser.set_defaults(run=_run, recipe=None, device="cpu")


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.use.exporting import export_gguf, export_model, find_gguf_converter

    if (arguments.output is None) == (arguments.gguf is None):
        raise ValueError("output: name a new folder, or a file by --gguf, one of both.")
    if arguments.gguf is not None:
        find_gguf_converter()  # It raises an error before a model is loaded.
        export_gguf(load_model(arguments), arguments.gguf)
        return Outcome(text=format_table([("written", arguments.gguf)]))
    return Outcome(text=format_table([("written", str(export_model(load_model(arguments), arguments.output)))]))
