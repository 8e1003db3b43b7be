"""Makes up rows in the format of a data set, so that a model can be probed before any private row is read.

The rows are a function of the types of the columns and of the model's configuration. If a data set does not state the
types, they are the types that its first rows have.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Array3D, Array4D, Array5D, ClassLabel, Dataset, Features, LargeList, List, Value
from transformers import PretrainedConfig, PreTrainedModel

from hf_dpzo.data.pairs import is_pair
from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.isolation.row_generator import REMEDY, Column, RowGenerator, find_kind
from hf_dpzo.models.activation import find_invocation
from hf_dpzo.models.feature_config import find_beginning
from hf_dpzo.models.unwrap import unwrap_model


# The number of rows whose types are compared if a data set does not state them.
NUM_COMPARED_ROWS = 9


# Lengths in tokens. Few models have a dimension of size 11, so the probe mistakes none for the tokens.
PROBE_LENGTHS = (11, 11, 11, 11, 11, 5, 22)


ARRAYS = (Array2D, Array3D, Array4D, Array5D)


# Where an adapter is activated, rows whose answer alone is learned are evaluated from there on, and others as a whole.
# So many of the commonest length are of the second kind, and all of other lengths, so that both ways are tried.
_WHOLE_ROWS = 2


# The most targets of the rows beside the first one, which has all. A target costs a product with all words of a
# vocabulary, and rows are replaced by the first, so that their targets change in number too.
_FEW_TARGETS = 16


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Rows of one length, by their numbers, whether their answer alone is learned, and by how many targets at most."""

    length: int
    numbers: range
    is_answer_alone: bool = False
    most_targets: int | None = None


class SeveralTypesError(ValueError):
    """Rows have several types of columns, between which one row could decide."""


def generate_probe_rows(
    dataset: Any,
    model: torch.nn.Module,
    *,
    lengths: Sequence[int] = PROBE_LENGTHS,
    kept_columns: Collection[str] | None = None,
    ending: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Return made-up rows for `probe_isolation`. See `generate_rows` for the other arguments and the errors.

    Args:
        dataset: the data set whose format the rows have.
        model: the model to be probed.
        lengths: the number of tokens of each row. Best are five equal ones, a smaller and a larger.
        kept_columns: the columns that the rows have; `None` for all.
        ending: the tokens that each row ends with, if that is public.
    """
    (length, count), *others = Counter(lengths).items()
    answers = max(1, count - _WHOLE_ROWS)
    few = {"is_answer_alone": True, "most_targets": _FEW_TARGETS}
    groups = [
        _Group(length=length, numbers=range(1), is_answer_alone=answers > 1),
        _Group(length=length, numbers=range(1, answers), **few),
        # Of an activated adapter's rows as a whole, targets stand before the invocation too.
        _Group(length=length, numbers=range(answers, count), **({} if find_invocation(model) else few)),
        *(_Group(length=other, numbers=range(count)) for other, count in others),
    ]
    return _generate(dataset, model, groups, kept_columns, ending)


def generate_rows(
    dataset: Any,
    model: torch.nn.Module,
    *,
    count: int,
    length: int,
    kept_columns: Collection[str] | None = None,
    ending: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Return `count` rows of `length` tokens. They are the same each time, and draw from no global generator.

    Args:
        dataset: the data set whose format the rows have. Of a `datasets.Dataset`, only the features and the format are
            read. Of any other data set, whose rows are mappings, only the types in the first few rows are read, never
            values or lengths. All but one must have the same, so that no single row decides.
        model: the model, whose configuration says the number of tokens and of labels.
        count: the number of rows.
        length: the number of tokens in each row; more if one that activates the adapter needs more.
        kept_columns: the columns that the rows have, since others never reach the collator; `None` for all.
        ending: the tokens that each row ends with, if that is public. They hold the invocation, if there is one.

    Raises:
        ValueError: a column cannot be made up, such as one of texts or images, or has no room for an invocation.
    """
    groups = [_Group(length=length, numbers=range(count), is_answer_alone=True)]
    return _generate(dataset, model, groups, kept_columns, ending)


def _generate(
    dataset: Any,
    model: torch.nn.Module,
    groups: Sequence[_Group],
    kept: Collection[str] | None,
    ending: Sequence[int],
) -> list[dict[str, Any]]:
    """Return the rows of all groups."""
    config = unwrap_model(model).config if isinstance(unwrap_model(model), PreTrainedModel) else PretrainedConfig()
    columns = [column for column in infer_columns(dataset) if kept is None or column.name in kept]
    # A length that the features fix is public, and every row has it.
    fixed = next((column.shape[-1] for column in columns if column.name == "input_ids" and column.shape), None)
    kind = find_kind(model)
    invocation, beginning = find_invocation(model) or (), find_beginning(model)
    least = max(count_least_tokens(invocation, columns), len(ending) + 1 if ending else 0)
    rows = []
    for group in groups:
        tokens = fixed or max(group.length, least)
        generator = RowGenerator(
            config=config,
            kind=kind,
            length=tokens,
            series=group.length,
            invocation=invocation,
            beginning=beginning,
            ending=tuple(ending),
            is_answer_alone=group.is_answer_alone and bool(invocation) and not ending,
            most_targets=group.most_targets,
        )
        rows += [generator.generate_row(columns, index) for index in group.numbers]
    return _format_like(rows, dataset) if _has_features(dataset) else rows


def count_least_tokens(invocation: Sequence[int], columns: Sequence[Column]) -> int:
    """Return how many tokens a row needs to hold `invocation`; 0 for none.

    The shorter text of a made-up pair has two thirds of the tokens, or somewhat more.

    >>> count_least_tokens([5, 6], []), count_least_tokens([], [])
    (2, 0)
    """
    needed = len(invocation)
    return (3 * (needed + 1) + 1) // 2 if needed and is_pair([column.name for column in columns]) else needed


def infer_columns(dataset: Any) -> list[Column]:
    """Return the types of columns: those that a data set states, or those of its first rows, of which one may differ.

    Raises:
        ValueError: none of the first rows can be read as a mapping.
        SeveralTypesError: they have several types.

    >>> columns = infer_columns([{"input_ids": [5], "labels": 1}])
    >>> [(column.name, column.python_type.__name__, column.shape) for column in columns]
    [('input_ids', 'int', (None,)), ('labels', 'int', ())]
    """
    if _has_features(dataset):
        names = dataset.features if dataset.format["output_all_columns"] else dataset.format["columns"]
        return [_column_from_feature(name, dataset.features[name]) for name in names]
    found = (_infer_row_columns(dataset, index) for index in range(min(NUM_COMPARED_ROWS, len(dataset))))
    rows = [columns for columns in found if columns]
    if not rows:
        raise ValueError(
            "train_dataset: its first rows fail, or are no mappings from columns to values; let it return a "
            "dictionary for each row, and try what makes them on public rows."
        )
    types = [tuple((column.name, column.python_type, column.shape) for column in columns) for columns in rows]
    (commonest, count), *_ = Counter(types).most_common(1)
    if len(types) - count > 1 or len(types) == 2 * count:
        raise SeveralTypesError(
            f"train_dataset: its first rows have columns of several types, and no single row may decide; {REMEDY}."
        )
    return rows[types.index(commonest)]


def _infer_row_columns(dataset: Any, index: int) -> list[Column] | None:
    """Return the types in one row; `None` if the row cannot be read, which must not show."""
    try:
        row = run_sealed("train_dataset", lambda: dict(dataset[index]))
        return run_sealed("train_dataset", lambda: [_column_from_value(name, value) for name, value in row.items()])
    except WithheldError:
        return None


def _has_features(dataset: Any) -> bool:
    """Return whether the data set's features say what its rows are. With a transform they do not."""
    return isinstance(dataset, Dataset) and dataset.format["type"] != "custom"


def _format_like(rows: list[dict[str, Any]], dataset: Dataset) -> list[dict[str, Any]]:
    if not rows:
        return rows
    features = Features({name: dataset.features[name] for name in rows[0]})
    row_format = dataset.format
    formatted = Dataset.from_list(rows, features=features).with_format(
        row_format["type"], **row_format["format_kwargs"]
    )
    return list(formatted)


def _column_from_feature(name: str, feature: Any) -> Column:
    shape = []
    while isinstance(feature, List | LargeList):
        size = feature.length if isinstance(feature, List) else -1
        shape.append(None if size < 0 else size)
        feature = feature.feature
    if isinstance(feature, ARRAYS):
        shape += feature.shape
        feature = Value(feature.dtype)
    if isinstance(feature, ClassLabel):
        feature = Value("int64")
    python_type = _to_python_type(feature.dtype) if isinstance(feature, Value) else type(feature)
    is_signed = not str(getattr(feature, "dtype", "")).startswith("uint")
    return Column(name=name, python_type=python_type, shape=tuple(shape), is_signed=is_signed)


def _column_from_value(name: str, value: Any) -> Column:
    if isinstance(value, torch.Tensor):
        dtype = value.dtype
        return Column(
            name=name,
            python_type=_to_python_type(str(dtype).removeprefix("torch.")),
            shape=(None,) * value.ndim,
            is_signed=dtype.is_signed,
            cast=lambda numbers: torch.tensor(numbers, dtype=dtype),
        )
    if isinstance(value, np.ndarray | np.generic):
        numpy_dtype = value.dtype
        return Column(
            name=name,
            python_type=_to_python_type(str(numpy_dtype)),
            shape=(None,) * value.ndim,
            is_signed=numpy_dtype.kind != "u",
            cast=lambda numbers: np.asarray(numbers, dtype=numpy_dtype)[()],
        )
    shape = []
    while isinstance(value, list | tuple):
        shape.append(None)
        value = value[0] if value else 0  # An empty list has no type of entry. Most lists are of tokens.
    return Column(name=name, python_type=type(value), shape=tuple(shape))


def _to_python_type(dtype: str) -> type:
    """Return the Python type of a numpy, torch or Arrow type.

    >>> _to_python_type("uint8"), _to_python_type("bfloat16"), _to_python_type("bool"), _to_python_type("large_string")
    (<class 'int'>, <class 'float'>, <class 'bool'>, <class 'str'>)
    """
    prefixes = {"int": int, "uint": int, "float": float, "bfloat": float, "double": float, "bool": bool, "string": str}
    name = dtype.removeprefix("large_")
    return next((python_type for prefix, python_type in prefixes.items() if name.startswith(prefix)), object)
