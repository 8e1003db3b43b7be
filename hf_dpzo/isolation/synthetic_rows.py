"""Rows of a data set's format whose content is made up, for trying things out before any private row is read.

They are a function of the types of the columns and of the model's configuration. Where a data set does not state the
types, those that most of its first rows have are taken.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Array3D, Array4D, Array5D, ClassLabel, Dataset, Features, LargeList, List, Value
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.models.unwrap import class_name, unwrap_model


# Of how many rows the types are compared, where no features say them.
COMPARED = 9


# Models rarely have the first as a size, so that the probe takes nothing else for tokens.
PROBE_LENGTHS = (11, 11, 11, 11, 11, 5, 22)


LABEL_COLUMNS = ("label", "labels", "label_ids")


TOKEN_COLUMNS = ("input_ids", "token_type_ids", "position_ids")


ARRAYS = (Array2D, Array3D, Array4D, Array5D)


CLASSIFIERS = frozenset(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())


TAGGERS = frozenset(modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values())


REMEDY = "pass probe_rows, public rows of that format"


@dataclass(frozen=True, kw_only=True)
class Column:
    """The type of one column.

    Args:
        name: of the column.
        python_type: `int`, `float`, `bool`, or a type that can not be made up.
        shape: one entry for each dimension of a value: its size, or None where it differs between rows or is private.
        cast: makes a value of numbers in nested lists.
    """

    name: str
    python_type: type
    shape: tuple[int | None, ...] = ()
    cast: Callable[[Any], Any] = lambda value: value

    @property
    def unsupported_error(self) -> ValueError:
        """What is raised where no value can be made up."""
        dimensions = f" in {len(self.shape)} dimensions" if self.shape else ""
        return ValueError(
            f"column={self.name}: values of type {self.python_type.__name__}{dimensions} can not be made up; {REMEDY}."
        )


def generate_probe_rows(
    dataset: Any,
    model: torch.nn.Module,
    *,
    lengths: Sequence[int] = PROBE_LENGTHS,
    kept_columns: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of these lengths for `isolation.probe`: best five of one, a shorter and a longer.

    Takes and raises what `generate_rows` does.
    """
    return _generate(dataset, model, Counter(lengths), kept_columns)


def generate_rows(
    dataset: Any, model: torch.nn.Module, *, count: int, length: int, kept_columns: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return `count` rows of `length` tokens. They are the same each time, and draw from no global generator.

    Args:
        dataset: a `datasets.Dataset`, of which the features and the format are read, or any data set whose rows are
            mappings, of which the types in the first few are read, never values or lengths, and by majority, so that
            no single row decides.
        model: its configuration says how many tokens and labels there are.
        count: rows.
        length: tokens in each.
        kept_columns: the columns that the rows have; the others never reach the collator. None: all.

    Raises:
        ValueError: for a column that can not be made up, such as one of texts or images.
    """
    return _generate(dataset, model, {length: count}, kept_columns)


def _generate(
    dataset: Any, model: torch.nn.Module, counts: Mapping[int, int], kept: Collection[str] | None
) -> list[dict[str, Any]]:
    """Rows of each length in `counts`, as many as it says."""
    config = unwrap_model(model).config if isinstance(unwrap_model(model), PreTrainedModel) else PretrainedConfig()
    columns = [column for column in infer_columns(dataset) if kept is None or column.name in kept]
    # Where the features fix the length of a row, they are public, and each row has it.
    fixed = next((column.shape[0] for column in columns if column.name == "input_ids" and column.shape), None)
    head = class_name(unwrap_model(model))
    makers = {n: _RowGenerator(config=config, head=head, length=fixed or n, series=n) for n in counts}
    rows = [makers[length].generate_row(columns, index) for length, count in counts.items() for index in range(count)]
    return _format_like(rows, dataset) if _has_features(dataset) else rows


def infer_columns(dataset: Any) -> list[Column]:
    """The types of a data set's columns.

    >>> columns = infer_columns([{"input_ids": [5], "labels": 1}])
    >>> [(column.name, column.python_type.__name__, column.shape) for column in columns]
    [('input_ids', 'int', (None,)), ('labels', 'int', ())]
    """
    if _has_features(dataset):
        names = dataset.features if dataset.format["output_all_columns"] else dataset.format["columns"]
        return [_column_from_feature(name, dataset.features[name]) for name in names]
    found = [columns for index in range(min(COMPARED, len(dataset))) if (columns := _infer_row_columns(dataset, index))]
    if not found:
        raise ValueError(
            "train_dataset: its first rows fail, or are no mappings from columns to values; try what makes them on "
            "public rows."
        )
    kinds = [tuple((column.name, column.python_type, column.shape) for column in columns) for columns in found]
    (commonest, _), *_ = Counter(kinds).most_common(1)
    return found[kinds.index(commonest)]


def _infer_row_columns(dataset: Any, index: int) -> list[Column] | None:
    """The types in one row; `None` where it can not be read, which must not show."""
    try:
        row = run_sealed("train_dataset", lambda: dict(dataset[index]))
        return run_sealed("train_dataset", lambda: [_column_from_value(name, value) for name, value in row.items()])
    except WithheldError:
        return None


@dataclass(frozen=True, kw_only=True)
class _RowGenerator:
    """Makes rows.

    Args:
        config: of the model.
        head: the name of the model's class.
        length: tokens of a row.
        series: tells rows of one call from those of others.
    """

    config: PretrainedConfig
    head: str
    length: int
    series: int

    def generate_row(self, columns: list[Column], index: int) -> dict[str, Any]:
        # A generator for each row, so that asking for more rows changes none of them.
        draw = np.random.Generator(np.random.Philox(key=self.series << 32 | index))
        tokens = self._generate_tokens(draw) if any(column.name == "input_ids" for column in columns) else []
        return {column.name: column.cast(self._value(column, tokens, draw)) for column in columns}

    def _generate_tokens(self, draw: np.random.Generator) -> list[int]:
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        padding = getattr(self.config, "pad_token_id", None)
        used = [token for token in range(size or 0) if token != padding]
        if not used:
            raise ValueError(f"column=input_ids: the model says of no token that it knows it; {REMEDY}.")
        return [used[place] for place in draw.integers(len(used), size=self.length)]

    def _value(self, column: Column, tokens: list[int], draw: np.random.Generator) -> Any:
        if column.python_type not in (int, float, bool) or (column.name in TOKEN_COLUMNS and len(column.shape) != 1):
            raise column.unsupported_error
        if column.name == "input_ids":
            return tokens
        if column.name in LABEL_COLUMNS:
            return self._label(column, tokens, draw)
        if column.name == "token_type_ids":
            return [0] * self.length
        if column.name == "position_ids":
            return list(range(self.length))
        return self._numbers(column, draw)

    def _label(self, column: Column, tokens: list[int], draw: np.random.Generator) -> Any:
        """Classes are the first two, which each head and each prompt has."""
        classes = min(2, self.config.num_labels) if column.python_type is int else 2
        if not column.shape:
            return column.python_type(draw.integers(classes))
        if len(column.shape) > 1:
            raise column.unsupported_error
        if column.python_type is not int or self.head in CLASSIFIERS:
            return [column.python_type(label) for label in draw.integers(2, size=self.config.num_labels)]
        if self.head in TAGGERS:
            return draw.integers(classes, size=self.length).tolist()
        return tokens

    def _numbers(self, column: Column, draw: np.random.Generator) -> Any:
        """Positive numbers for features and weights, and ones for masks; for each token where the size is unknown."""
        if len(column.shape) > 1 and None in column.shape:
            raise column.unsupported_error  # Such as an image, whose size is not ours to look at.
        sizes = [self.length if size is None else size for size in column.shape]
        varied = column.python_type is float and not column.name.endswith("mask")
        return draw.random(sizes).tolist() if varied else np.full(sizes, column.python_type(1)).tolist()


def _has_features(dataset: Any) -> bool:
    """Whether the features say what the rows are, which they do not where a function makes the rows of them."""
    return isinstance(dataset, Dataset) and dataset.format["type"] != "custom"


def _format_like(rows: list[dict[str, Any]], dataset: Dataset) -> list[dict[str, Any]]:
    if not rows:
        return rows
    features = Features({name: dataset.features[name] for name in rows[0]})
    form = dataset.format
    return list(Dataset.from_list(rows, features=features).with_format(form["type"], **form["format_kwargs"]))


def _column_from_feature(name: str, feature: Any) -> Column:
    shape = []
    while isinstance(feature, List | LargeList):
        fixed = feature.length if isinstance(feature, List) else -1
        shape.append(None if fixed < 0 else fixed)
        feature = feature.feature
    if isinstance(feature, ARRAYS):
        shape, feature = [*shape, *feature.shape], Value(feature.dtype)
    if isinstance(feature, ClassLabel):
        feature = Value("int64")
    kind = _to_python_type(feature.dtype) if isinstance(feature, Value) else type(feature)
    return Column(name=name, python_type=kind, shape=tuple(shape))


def _column_from_value(name: str, value: Any) -> Column:
    if isinstance(value, torch.Tensor):
        dtype = value.dtype
        return Column(
            name=name,
            python_type=_to_python_type(str(dtype).removeprefix("torch.")),
            shape=(None,) * value.ndim,
            cast=lambda made: torch.tensor(made, dtype=dtype),
        )
    if isinstance(value, np.ndarray | np.generic):
        numbers = value.dtype
        return Column(
            name=name,
            python_type=_to_python_type(str(numbers)),
            shape=(None,) * value.ndim,
            cast=lambda made: np.asarray(made, dtype=numbers)[()],
        )
    shape = []
    while isinstance(value, list | tuple):
        shape.append(None)
        value = value[0] if value else 0  # An empty list does not say of what; most are of tokens.
    return Column(name=name, python_type=type(value), shape=tuple(shape))


def _to_python_type(dtype: str) -> type:
    """The Python type of a numpy, torch or arrow one.

    >>> _to_python_type("uint8"), _to_python_type("bfloat16"), _to_python_type("bool"), _to_python_type("large_string")
    (<class 'int'>, <class 'float'>, <class 'bool'>, <class 'str'>)
    """
    starts = {"int": int, "uint": int, "float": float, "bfloat": float, "double": float, "bool": bool, "string": str}
    return next((kind for start, kind in starts.items() if dtype.removeprefix("large_").startswith(start)), object)
