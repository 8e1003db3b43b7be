"""`hf-dpzo merge`: write the adapter of a trained model into the weights of its base model."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.asking import add_place_flags, load_model
from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("merge", help="write an adapter into the weights of its base model")
    add_place_flags(parser)
    parser.add_argument("--output", required=True, help="a new folder, which transformers opens without PEFT")
    parser.set_defaults(run=_run, recipe=None, device="cpu")


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.use.merging import merge_adapter

    merged = merge_adapter(load_model(arguments), arguments.output)
    rows = [("written", str(merged.folder)), ("largest change of a score", f"{merged.drift:.1e} of the largest score")]
    return Outcome(text=format_table(rows))
