"""`hf-dpzo evaluate`: measure a trained model on labelled rows, as its run did."""

import argparse
from collections.abc import Sequence

from hf_dpzo.cli.asking import add_model_flags, add_reading_flags, load_asked_model
from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("evaluate", help="measure a trained model on labelled rows")
    add_model_flags(parser)
    parser.add_argument("--data", help="a CSV, TSV, JSON (lines) or Parquet file of rows with labels")
    add_reading_flags(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.use.tables import read_rows

    if arguments.data is None:
        raise ValueError("data: missing; name a file of rows with labels, as --data rows.csv.")
    rows = read_rows(arguments.data, encoding=arguments.encoding, separator=arguments.separator)
    metrics = load_asked_model(arguments, rows, labelled=True).evaluate(rows, batch_size=arguments.batch_size)
    return Outcome(text=format_table([(name, f"{value:.6g}") for name, value in metrics.items()]))
