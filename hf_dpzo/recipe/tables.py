"""Loads the tables that a recipe names: the rows to train on and the rows to evaluate on, before they are encoded."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_dpzo.data.cells import Classes, is_missing
from hf_dpzo.models.location import is_local_place, resolve_path
from hf_dpzo.recipe.bars import uncounted_bar
from hf_dpzo.recipe.columns import describe_missing_column, explain_missing_column
from hf_dpzo.recipe.files import FileReader, UnreadableFileError, list_suffixes
from hf_dpzo.recipe.holding_out import hold_out, take_share
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.written import find_suffix


def load_tables(recipe: Recipe, *, unit_column: str | None = None) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the training rows and the evaluation rows, before they are encoded.

    Rows of which a cell is missing are left out, or refused, as `recipe.if_missing` says.

    Args:
        recipe: the recipe.
        unit_column: the column that says to which unit of privacy a row belongs; `None` if each row is a unit.

    Raises:
        ValueError: data are missing, can not be read, or do not have the columns that the recipe names.
    """
    with uncounted_bar("Reading rows"):
        train, evaluation = _load_splits(recipe)
    train = select_rows(_shorten_floats(train, recipe), recipe)
    if evaluation is not None:
        evaluation = select_rows(_shorten_floats(evaluation, recipe), recipe)
    elif recipe.eval_rows is not None or recipe.eval_share is not None:
        train, evaluation = _hold_out(train, recipe, unit_column)
    if recipe.train_share is not None:
        known = {"seed": recipe.split_seed, "columns": recipe.used_columns}
        train = take_share(train, share=recipe.train_share, **known)
    return train, evaluation


def _hold_out(
    train: datasets.Dataset, recipe: Recipe, unit_column: str | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    if unit_column is not None and unit_column not in train.column_names:
        fault = describe_missing_column(unit_column, train.column_names, recipe)
        raise ValueError(f"privacy_unit_column={unit_column}: {fault}; name one of these.")
    return hold_out(
        train,
        count=recipe.eval_rows,
        share=recipe.eval_share,
        seed=recipe.split_seed,
        unit_column=unit_column,
        columns=recipe.used_columns,
    )


def _load_splits(recipe: Recipe) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return all training rows, and all evaluation rows where the recipe names some."""
    train = _load_split(recipe, recipe.data, recipe.data_config, recipe.train_split)
    if recipe.eval_data is not None:
        if _find_path(recipe.eval_data).resolve() == _find_path(recipe.data).resolve():
            raise ValueError(
                f"eval_data={recipe.eval_data}: it is the training data; name another file, or set eval_rows."
            )
        return train, _load_split(recipe, recipe.eval_data, None, "train")
    if recipe.eval_split is not None:
        if recipe.eval_split == recipe.train_split:
            raise ValueError(f"eval_split={recipe.eval_split}: it is the training data; name another split.")
        return train, _load_split(recipe, recipe.data, recipe.data_config, recipe.eval_split)
    return train, None


def _find_path(name: str) -> Path:
    return Path(resolve_path(name)).expanduser()


def refuse_missing_files(recipe: Recipe, **others: str | None) -> None:
    """Raise `ValueError` if a file of rows that `recipe` names is not there, before anything is loaded for it.

    Args:
        recipe: the recipe.
        others: further files by the names of their flags; `None` for none.
    """
    for flag, name in {"data": recipe.data, "eval_data": recipe.eval_data, **others}.items():
        if name is not None:
            _refuse_missing_file(flag, name)


def _refuse_missing_file(flag: str, name: str) -> None:
    path = _find_path(name)
    if (find_suffix(path) in list_suffixes() or is_local_place(name)) and not path.exists():
        raise ValueError(
            f"{flag}={name}: no such file ({path.absolute()}); a relative path is one of the current folder, or one "
            "beside the recipe."
        )


def _load_split(recipe: Recipe, name: str, config: str | None, split: str) -> datasets.Dataset:
    path = _find_path(name)
    reader = FileReader(
        encoding=recipe.encoding, separator=recipe.separator, missing_words=tuple(recipe.missing_words or ())
    )
    if path.is_dir():
        return reader.read_folder(path, config, split)
    if path.is_file():
        if split != "train":
            raise ValueError(
                f"split={split}: a file has no splits; name the other file as eval_data, or set eval_rows."
            )
        return reader.read_file(path)
    _refuse_missing_file("data", name)
    return _load_from_hub(name, config, split)


def _load_from_hub(name: str, config: str | None, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:
        reason = type(error).__name__
    raise UnreadableFileError(
        f"data={name}: there is no such file, and the Hub gives no split {split} of that name ({reason}); "
        "name one that exists, and its data_config if it has several."
    )


def _shorten_floats(rows: datasets.Dataset, recipe: Recipe) -> datasets.Dataset:
    """Return the rows with numbers of few bits as they are written: Python would take 0.1 for 0.10000000149."""
    for name in recipe.used_columns:
        kind = getattr(rows.features.get(name), "dtype", None)
        if kind in ("float16", "float32"):
            cells = [cell if is_missing(cell) else float(str(np.dtype(kind).type(cell))) for cell in rows[name]]
            shortened = datasets.Dataset.from_dict({name: cells}, datasets.Features({name: datasets.Value("float64")}))
            rows = datasets.concatenate_datasets([rows.remove_columns(name), shortened], axis=1)
    return rows


def select_rows(rows: datasets.Dataset, recipe: Recipe) -> datasets.Dataset:
    """Return the rows that `where` describes, and that have what the task needs. Each row decides for itself."""
    _refuse_missing_columns(rows, recipe)
    wanted = {name: str(value) for name, value in recipe.where_values.items()}
    if wanted:
        rows = keep_rows(rows, [*wanted], lambda row: _is_wanted(row, wanted))
        if not len(rows):
            raise ValueError(f"where={recipe.where}: no row has these values; write them as the data do.")
    needs = recipe.kind.needs(recipe)
    if recipe.if_missing != "empty":
        needs = [(name,) for name in recipe.used_columns]
    complete = keep_rows(rows, recipe.used_columns, lambda row: _is_complete(row, needs))
    if recipe.if_missing == "refuse" and len(complete) < len(rows):
        raise ValueError(
            f"if_missing=refuse: a cell is missing in {', '.join(recipe.used_columns)}; fill it in, or set it to "
            "skip or empty."
        )
    if not len(complete):
        raise ValueError(
            f"data={recipe.data}: no row has a value in {', '.join(recipe.used_columns)}; name other columns or rows."
        )
    return complete


def _refuse_missing_columns(rows: datasets.Dataset, recipe: Recipe) -> None:
    present = rows.column_names
    for name in recipe.where_values:
        if name not in present:
            fault = describe_missing_column(name, present, recipe)
            raise ValueError(f"where={recipe.where}: {fault}; name one of these.")
    for name in recipe.used_columns:
        if name not in present:
            raise ValueError(explain_missing_column(name, present, recipe))


def keep_rows(
    rows: datasets.Dataset, columns: Sequence[str], decide: Callable[[Mapping[str, Any]], bool]
) -> datasets.Dataset:
    """Return the rows for which `decide`, given their `columns`, is true."""
    kept = [index for index, row in enumerate(rows.select_columns([*columns])) if decide(row)]
    return rows if len(kept) == len(rows) else rows.select(kept)


def _is_wanted(row: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    return all(Classes(names=(value,)).find(row[name], name) is not None for name, value in wanted.items())


def _is_complete(row: Mapping[str, Any], needs: Sequence[Sequence[str]]) -> bool:
    return all(any(not is_missing(row[name]) and row[name] != "" for name in need) for need in needs)
