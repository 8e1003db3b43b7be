"""`hf-dpzo card`: write the card of a run again, from what is on disk."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("card", help="write README.md and privacy.json of a run anew, from its log")
    parser.add_argument("folder", help="the folder of a run, or of a model that it saved")
    parser.add_argument(
        "--without-results",
        "--without_results",
        action="store_true",
        help="leave the evaluation figures out, such as those on private rows, which no epsilon covers",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.card.files import CARD_FILE, STATEMENT_FILE
    from hf_dpzo.card.repository import refresh_card

    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise ValueError(f"folder={folder}: there is no such folder; name the output_dir of a run.")
    refresh_card(folder, without_results=arguments.without_results)
    return Outcome(text=format_table([("written", str(folder / name)) for name in (CARD_FILE, STATEMENT_FILE)]))
