"""Files of rows that are asked, and of answers: read as training data are, written whole or not at all."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_dpzo.io.files import replace_all
from hf_dpzo.plots import check_output_path
from hf_dpzo.recipe.files import FileReader
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.written import explain_separator, find_separator, list_columns


# The column of the answer in a file, and that of its probability.
ANSWER_COLUMN, SCORE_COLUMN = "prediction", "score"


def read_rows(path: str | Path, *, encoding: str | None = None, separator: str | None = None) -> datasets.Dataset:
    """Return the rows of a file, each value as it is written.

    Raises:
        ValueError: there is no such file, or it can not be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"data={path}: no such file ({path.absolute()}); name a file of rows.")
    separator = "\t" if separator == r"\t" else separator  # As in a recipe.
    return FileReader(encoding=encoding, separator=separator).read_file(path)


def check_columns(rows: datasets.Dataset, recipe: Recipe, *, path: str | Path, labelled: bool = False) -> None:
    """Raise `ValueError` if rows have not the columns that a model reads; call it before the model is loaded.

    Args:
        rows: the rows.
        recipe: the recipe of the model's run.
        path: the file of the rows, for the message.
        labelled: whether their labels are needed too.
    """
    needed = recipe.used_columns if labelled else recipe.kind.input_columns(recipe)
    missing = next((name for name in needed if name not in rows.column_names), None)
    if missing is None:
        return
    separator = find_separator(rows.column_names)
    if separator is not None:
        raise ValueError(f"data={path}: {explain_separator(separator)}.")
    inputs = recipe.kind.input_columns(recipe)
    use = (
        "which the model reads" if missing in inputs else f"which holds the labels to compare with {', '.join(inputs)}"
    )
    raise ValueError(
        f"data={path}: it has no column {missing}, {use}, only {list_columns(rows.column_names)}; rename the column in "
        "its first row, or name another file."
    )


def check_answers_path(
    path: str | Path, data: str | Path | None, columns: Sequence[str], *, overwrites: bool = False
) -> None:
    """Raise `ValueError` where answers can not be written; call it before a model is loaded.

    Args:
        path: the file of the answers.
        data: the file of the rows; `None` for none.
        columns: the columns of the rows.
        overwrites: whether the file may be there already, and is to be replaced.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"output={path}: its suffix says no kind of file; end it in {', '.join(_WRITERS)}.")
    check_output_path(path, flag="output")
    if data is not None and path.resolve() == Path(data).expanduser().resolve():
        raise ValueError(f"output={path}: it is the file of the rows; name another.")
    if path.exists() and not overwrites:
        raise ValueError(f"output={path}: it is there already; name a new file, or add --overwrite to replace it.")
    taken = next((name for name in (ANSWER_COLUMN, SCORE_COLUMN) if name in columns), None)
    if taken is not None:
        raise ValueError(f"column={taken}: the rows have a column of that name, and answers go into it; rename it.")


def write_answers(
    path: str | Path, rows: Sequence[Mapping[str, Any]], answers: Sequence[Any], *, separator: str | None = None
) -> None:
    """Write each row with its answer behind it, in the form that the suffix of `path` says.

    Args:
        path: a file that ends in .csv, .tsv, .jsonl, .ndjson, .json or .parquet. One of that name is replaced.
        rows: the rows.
        answers: what `predict` or `generate` returned for them.
        separator: what the data write between several labels of a row; `None` for a list.

    >>> name_answer({"label": "yes", "score": 0.75, "scores": {"no": 0.25, "yes": 0.75}})
    {'prediction': 'yes', 'score': 0.75}
    """
    named = [name_answer(answer, separator=separator) for answer in answers]
    columns = dict.fromkeys(name for answer in named for name in answer)
    table = [{**row, **{name: answer.get(name) for name in columns}} for row, answer in zip(rows, named, strict=True)]
    replace_all({Path(path): _WRITERS[Path(path).suffix.lower()](table)})


def name_answer(answer: Any, *, separator: str | None = None) -> dict[str, Any]:
    """Return an answer as the columns of a file.

    >>> name_answer({"labels": ["a", "b"], "scores": {"a": 0.9, "b": 0.8, "c": 0.1}}, separator=";")
    {'prediction': 'a;b'}
    >>> name_answer("A text."), name_answer({"numbers": {"stars": 4.0, "price": 1.5}}), name_answer(None)
    ({'prediction': 'A text.'}, {'prediction': {'stars': 4.0, 'price': 1.5}}, {'prediction': None})
    """
    if not isinstance(answer, Mapping):
        return {ANSWER_COLUMN: answer}
    found = next(answer[name] for name in ("label", "labels", "number", "numbers", "text") if name in answer)
    if separator is not None and isinstance(found, list):
        found = separator.join(found)
    score = {SCORE_COLUMN: round(answer["score"], 6)} if "score" in answer else {}
    return {ANSWER_COLUMN: found, **score}


def format_answers(answers: Sequence[Any]) -> str:
    """Return the answers as lines of JSON, for standard output."""
    return "".join(f"{json.dumps(name_answer(answer))}\n" for answer in answers)


def _write_separated(separator: str) -> Callable[[Sequence[Mapping[str, Any]]], bytes]:
    def write(table: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(table[0]), delimiter=separator, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _write_cell(cell) for name, cell in row.items()} for row in table)
        return text.getvalue().encode()

    return write


def _write_cell(cell: Any) -> Any:
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell


def _write_lines(table: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in table).encode()


def _write_array(table: Sequence[Mapping[str, Any]]) -> bytes:
    return f"{json.dumps(list(table), ensure_ascii=False, indent=1, default=str)}\n".encode()


def _write_parquet(table: Sequence[Mapping[str, Any]]) -> bytes:
    data = io.BytesIO()
    datasets.Dataset.from_list([dict(row) for row in table]).to_parquet(data)
    return data.getvalue()


_WRITERS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], bytes]] = {
    ".csv": _write_separated(","),
    ".tsv": _write_separated("\t"),
    ".jsonl": _write_lines,
    ".ndjson": _write_lines,
    ".json": _write_array,
    ".parquet": _write_parquet,
}
