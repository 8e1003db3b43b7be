"""Generates rows of one length from the types of their columns and the configuration of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from hf_dpzo.data.pairs import TEXT_COLUMNS, assign_tokens
from hf_dpzo.isolation.media import find_media_shape
from hf_dpzo.isolation.neighbors import find_end_token
from hf_dpzo.losses.heads import FEATURE_HEAD, find_head
from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.models.unwrap import unwrap_model


LABEL_COLUMNS = ("label", "labels", "label_ids")


TOKEN_COLUMNS = (*TEXT_COLUMNS, "token_type_ids", "position_ids")


# The columns of an answer, which are places in a row.
PLACE_COLUMNS = ("start_positions", "end_positions")


# The columns of what a decoder reads, which are as long as its labels.
DECODER_COLUMNS = ("decoder_input_ids", "decoder_attention_mask")


REMEDY = "pass probe_rows, public rows of that format"


# What the labels of a model are, by the names of its loss in transformers, where no table lists the model.
OTHER_KINDS = {"ForSequenceClassification": "class", "ForTokenClassification": "classes of tokens"}


# The number of choices of a row of which the features do not say how many it has.
NUM_CHOICES = 2


@dataclass(frozen=True, kw_only=True)
class Column:
    """The type of one column.

    Args:
        name: the column's name.
        python_type: `int`, `float`, `bool`, or a type of which no value can be made up.
        shape: the size of each dimension of a value; `None` for a size that varies between rows or is private.
        is_signed: whether a value can be negative, as that of a token which is not learned is.
        cast: a function from numbers in nested lists to a value.
    """

    name: str
    python_type: type
    shape: tuple[int | None, ...] = ()
    is_signed: bool = True
    cast: Callable[[Any], Any] = lambda value: value

    @property
    def unsupported_error(self) -> ValueError:
        """The error to raise if no value of this column can be made up."""
        dimensions = f" in {len(self.shape)} dimensions" if self.shape else ""
        return ValueError(
            f"column={self.name}: values of type {self.python_type.__name__}{dimensions} can not be made up; {REMEDY}."
        )


def find_kind(model: torch.nn.Module) -> str | None:
    """Return what the labels of `model` are, in words; `None` for a model of which nothing says it."""
    base, head = unwrap_model(model), find_head(model)
    if head is FEATURE_HEAD:
        return head.labels
    if head is None or not head.tables:
        return OTHER_KINDS.get(getattr(base, "loss_type", None))
    return head.labels


@dataclass(frozen=True, kw_only=True)
class RowGenerator:
    """Generates rows of one length.

    Args:
        config: the model's configuration.
        kind: what the labels are; see `find_kind`.
        length: the number of tokens in a row.
        series: the upper part of the generators' keys, which separates rows of one length from those of another.
        invocation: tokens that each text holds once, with others before and after them where there is room: those that
            activate an adapter. None by default.
        beginning: tokens that each text begins with if it has more of them. None by default.
        ending: tokens that each text ends with. They hold the invocation, if there is one. None by default.
        is_answer_alone: whether targets that are the tokens themselves begin behind the invocation, in the middle of
            the row, as where an answer alone is learned. Otherwise all tokens are targets.
        most_targets: the most targets of a row whose targets are the tokens themselves: the last ones. All by default.
    """

    config: PretrainedConfig
    kind: str | None
    length: int
    series: int
    invocation: tuple[int, ...] = ()
    beginning: tuple[int, ...] = ()
    ending: tuple[int, ...] = ()
    is_answer_alone: bool = False
    most_targets: int | None = None

    def generate_row(self, columns: list[Column], index: int) -> dict[str, Any]:
        """Return row number `index`, with a value for each of `columns`.

        Raises:
            ValueError: a column cannot be made up.
        """
        # Each row has a generator of its own, so that asking for more rows changes none of them.
        draw = np.random.Generator(np.random.Philox(key=self.series << 32 | index))
        column = next((column for column in columns if column.name in TEXT_COLUMNS), None)
        own = assign_tokens([column.name for column in columns], lambda: self._row_tokens(column, draw))
        return {column.name: column.cast(self._value(column, columns, own[column.name], draw)) for column in columns}

    def _row_tokens(self, column: Column, draw: np.random.Generator) -> list:
        """Return the tokens of a row, or of each of its choices, all of one length: some collators pad no choices."""
        if not self._has_choices(column):
            return self._insert_invocation(self._generate_tokens(draw, self.length, column.name), column.name)
        return [self._generate_tokens(draw, self.length, column.name) for _ in range(column.shape[0] or NUM_CHOICES)]

    def _generate_tokens(self, draw: np.random.Generator, length: int, name: str) -> list[int]:
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        end = find_end_token(self.config)
        left_out = (self._padding_token, end, *self.invocation[:1])
        allowed = [token for token in range(size or 0) if token not in left_out]
        if not allowed:
            raise ValueError(f"column={name}: the model says of no token that it knows it; {REMEDY}.")
        tokens = [allowed[index] for index in draw.integers(len(allowed), size=length)]
        if length > len(self.beginning):
            tokens[: len(self.beginning)] = self.beginning
        # A head that reads what stands at the end of the text finds one end in each row.
        return tokens if end is None else [*tokens[:-1], end]

    def _insert_invocation(self, tokens: list[int], name: str) -> list[int]:
        """Return `tokens` with the invocation in place of some of them: at the end, in the middle, or before it."""
        if self.ending:
            return [*tokens[: len(tokens) - len(self.ending)], *self.ending]
        count, room = len(self.invocation), len(tokens) - len(self.invocation)
        if not count:
            return tokens
        if room < 0:
            raise ValueError(
                f"column={name}: its {len(tokens)} tokens have no room for the {count} that activate the adapter; take "
                "longer rows, or an adapter that is always active."
            )
        middle = len(tokens) // 2
        start = min(max(1, middle if self.is_answer_alone else (middle - count) // 2), max(1, room - 1), room)
        return [*tokens[:start], *self.invocation, *tokens[start + count :]]

    @property
    def _padding_token(self) -> int | None:
        return getattr(self.config, "pad_token_id", None)

    def _has_choices(self, column: Column) -> bool:
        return self.kind == "choice" and len(column.shape) == 2

    def _value(self, column: Column, columns: list[Column], tokens: list, draw: np.random.Generator) -> Any:
        if column.python_type not in (int, float, bool):
            raise column.unsupported_error
        if self._has_choices(column) and tokens:
            return tokens if column.name == "input_ids" else [self._per_token(column, len(one)) for one in tokens]
        if column.name in TOKEN_COLUMNS and len(column.shape) != 1:
            raise column.unsupported_error
        if column.name in TEXT_COLUMNS:
            return tokens
        if column.name in LABEL_COLUMNS:
            return self._label(column, tokens, draw)
        if column.name in PLACE_COLUMNS:
            return self._place(column, draw)
        if column.name in TOKEN_COLUMNS:
            return self._per_token(column, self.length)
        return self._numbers(column, columns, draw)

    def _per_token(self, column: Column, length: int) -> list:
        if column.name == "position_ids":
            return list(range(length))
        return [column.python_type(column.name != "token_type_ids")] * length

    def _place(self, column: Column, draw: np.random.Generator) -> Any:
        place = column.python_type(draw.integers(self.length))
        return [place] if column.shape else place

    def _label(self, column: Column, tokens: list, draw: np.random.Generator) -> Any:
        """Return a label, or the labels of a row. Classes are the first two, which every head and every prompt has."""
        classes = min(2, self.config.num_labels) if column.python_type is int else 2
        if self.kind == "choice":
            classes = max(1, len(tokens))
        if not column.shape:
            return column.python_type(draw.integers(classes))
        if len(column.shape) > 1:
            return self._dense_labels(column, classes, draw)
        if column.python_type is not int or self.kind == "class":
            return [column.python_type(label) for label in draw.integers(2, size=self.config.num_labels)]
        if self.kind == "classes of tokens":
            return draw.integers(classes, size=self.length).tolist()
        if self.kind == "written tokens" or not tokens:
            return self._generate_tokens(draw, self._written_length, column.name)
        return self._choose_targets(tokens) if column.is_signed else tokens

    def _choose_targets(self, tokens: list[int]) -> list[int]:
        """Return the targets of a row: its tokens, those behind its invocation if its answer alone is learned."""
        first = 0 if self.most_targets is None else max(0, len(tokens) - self.most_targets)
        if self.is_answer_alone:
            count = len(self.invocation)
            starts = range(len(tokens) - count + 1)
            ends = (start + count for start in starts if tuple(tokens[start : start + count]) == self.invocation)
            first = max(first, next(ends))
        return [IGNORE_INDEX] * first + tokens[first:]

    def _dense_labels(self, column: Column, classes: int, draw: np.random.Generator) -> list:
        """Return a class for each point of an image."""
        shape = find_media_shape("pixel_values", 3, self.config, self.length)
        sizes = column.shape if None not in column.shape else (shape or ())[1:]
        if len(sizes) != len(column.shape) or column.python_type is not int:
            raise column.unsupported_error
        return draw.integers(classes, size=sizes).tolist()

    @property
    def _written_length(self) -> int:
        """The number of tokens that a decoder writes: another than it reads, since nothing may join the two."""
        return max(2, self.length // 2)

    def _numbers(self, column: Column, columns: list[Column], draw: np.random.Generator) -> Any:
        """Return positive numbers for features and weights, and ones for masks; one for each token if sizes vary."""
        sizes = self._sizes(column, columns)
        is_varied = column.python_type is float and not column.name.endswith("mask")
        return draw.random(sizes).tolist() if is_varied else np.full(sizes, column.python_type(1)).tolist()

    def _sizes(self, column: Column, columns: list[Column]) -> list[int]:
        """Return the sizes of a value: the features' own, or those of images and sounds that the model takes."""
        if None in column.shape:
            shape = find_media_shape(column.name, len(column.shape), self.config, self.length)
            if shape is not None:
                return list(shape)
            # Such as an image, whose size is private.
            if len(column.shape) > 1:
                raise column.unsupported_error
        length = self._written_length if column.name in DECODER_COLUMNS else self._sequence_length(columns)
        return [length if size is None else size for size in column.shape]

    def _sequence_length(self, columns: list[Column]) -> int:
        """Return the length of a mask: the number of tokens, or of samples or frames of a sound."""
        sounds = {column.name: column for column in columns if column.name in ("input_values", "input_features")}
        if not sounds or any(column.name == "input_ids" for column in columns):
            return self.length
        sound = next(iter(sounds.values()))
        shape = find_media_shape(sound.name, len(sound.shape), self.config, self.length)
        return shape[0] if shape else self.length
