"""What `hf-dpzo predict`, `generate` and `evaluate` have in common: where the model is, and which rows it is asked."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_dpzo.cli.output import Outcome, format_table


if TYPE_CHECKING:
    from hf_dpzo.use.model import TrainedModel


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where a trained model and its base model are."""
    parser.add_argument("model", help="the folder of a trained model or of its log, or user/model on the Hub")
    parser.add_argument("--base", help="where the base model is; by default where the log says")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a trained model that is to answer."""
    add_place_flags(parser)
    parser.add_argument("--recipe", help="the recipe that trained it, for a model from before recipes were saved")
    parser.add_argument("--device", help="such as cpu or cuda:1; by default a GPU if there is one")


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which rows a model is asked, and where its answers go."""
    add_model_flags(parser)
    parser.add_argument("--data", help="a CSV, TSV, JSON (lines) or Parquet file of rows, with the recipe's columns")
    parser.add_argument("--text", action="append", help="instead: a text; may be given several times")
    parser.add_argument(
        "--output", help="the file to write, of one of these kinds; default: JSON lines to the terminal"
    )
    parser.add_argument("--overwrite", action="store_true", help="--output: replace a file of that name")
    add_reading_flags(parser)


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how rows are read."""
    parser.add_argument("--encoding", help="of text files; default UTF-8")
    parser.add_argument("--separator", help="of cells; default the comma or tab of the suffix")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=16, help="rows at once; default 16")


def load_asked_model(arguments: argparse.Namespace, rows: Any, *, labelled: bool = False) -> "TrainedModel":
    """Load the model that the flags name, which answers `rows`; an error is raised before it is loaded.

    Args:
        arguments: the flags.
        rows: the `datasets.Dataset` of the file that they name; `None` for texts.
        labelled: whether the rows need their labels.
    """
    from hf_dpzo.use.loading import read_used_recipe
    from hf_dpzo.use.tables import check_columns

    recipe = read_used_recipe(arguments.model, revision=arguments.revision, recipe=arguments.recipe)
    if rows is not None:
        check_columns(rows, recipe, path=arguments.data, labelled=labelled)
    return load_model(arguments)


def load_model(arguments: argparse.Namespace) -> "TrainedModel":
    """Load the model that the flags name."""
    from hf_dpzo.use.loading import load

    return load(
        arguments.model,
        base=arguments.base,
        revision=arguments.revision,
        recipe=arguments.recipe,
        device=arguments.device,
    )


def ask_rows(arguments: argparse.Namespace, ask: Callable[["TrainedModel", Sequence[Any]], list[Any]]) -> Outcome:
    """Ask the model for all rows that the flags name, and write the answers."""
    from hf_dpzo.use.tables import check_answers_path, format_answers, read_rows, write_answers

    if (arguments.data is None) == (arguments.text is None):
        raise ValueError("data: name a file of rows, or texts by --text, one of both.")
    rows: Any = arguments.text
    if arguments.data is not None:
        rows = read_rows(arguments.data, encoding=arguments.encoding, separator=arguments.separator)
    columns = [] if arguments.data is None else rows.column_names
    if arguments.output is not None:
        check_answers_path(arguments.output, arguments.data, columns, overwrites=arguments.overwrite)
    model = load_asked_model(arguments, None if arguments.data is None else rows)
    listed = list(rows)
    answers = ask(model, listed)
    if arguments.output is None:
        return Outcome(text=format_answers(answers))
    table = listed if arguments.data is not None else [{"text": text} for text in listed]
    write_answers(arguments.output, table, answers, separator=model.recipe.label_separator)
    unanswered = sum(answer is None for answer in answers)
    lines = [("rows", str(len(answers))), ("written", arguments.output)]
    return Outcome(text=format_table([*lines, *([("rows without text", str(unanswered))] if unanswered else [])]))
