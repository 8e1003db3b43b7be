"""Texts with the names of columns in braces, and the tokens that they become."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_dpzo.data.cells import to_text


@dataclass(frozen=True, kw_only=True)
class Template:
    """A text with the names of columns in braces, and `{mask}` for the tokenizer's mask token.

    Args:
        template: the text.

    Raises:
        ValueError: the text names no column.

    >>> Template(template="{title}: {text}").fields
    ('title', 'text')
    >>> Template(template="{stars} of 5").render({"stars": "4"})
    '4 of 5'
    """

    template: str

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError(f"template={self.template!r}: it names no column; write one in braces, such as {{text}}.")
        try:
            self.render(dict.fromkeys(self.fields, ""))
        except ValueError:
            raise ValueError(
                f"template={self.template!r}: what follows a column's name in braces can not be done to a text; leave "
                "it out."
            ) from None

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the columns in the template, in order."""
        return tuple(name for _, name, _, _ in self.parts if name is not None and name != "mask")

    @property
    def has_mask(self) -> bool:
        """Whether the template is for a masked language model."""
        return "{mask}" in self.template

    @property
    def parts(self) -> list[tuple[str, str | None, str | None, str | None]]:
        """The texts of the template, each with the name, the format and the conversion of the column behind it."""
        try:
            return [*string.Formatter().parse(self.template)]
        except ValueError:
            raise ValueError(
                f"template={self.template!r}: a brace stands alone; write a brace that is text twice, {{{{ or }}}}, "
                "and the name of a column in single ones."
            ) from None

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` of one row.

        A text that is too long loses the end of its longest column, never a part of the template. A missing value is
        no text, and values that are no text are written as by `to_text`, each by itself.

        Args:
            row: the values of the columns by name.
            tokenizer: the model's tokenizer.
            max_length: the largest number of tokens.

        Raises:
            ValueError: the template alone is longer than `max_length`, or a value has no text.
        """
        columns = self.read_columns(row)
        if self.has_mask and tokenizer.mask_token:
            # In a column it would be a second mask.
            columns = {name: text.replace(tokenizer.mask_token, " ") for name, text in columns.items()}
        encoded = self._tokenize(columns, tokenizer)
        while len(encoded["input_ids"]) > max_length:
            columns = self.shorten(columns, tokenizer, len(encoded["input_ids"]) - max_length)
            if columns is None:
                raise ValueError(f"max_length={max_length}: the template alone is longer; raise max_length.")
            encoded = self._tokenize(columns, tokenizer)
        return encoded

    def encode_open(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, Any]:
        """Return what `encode` does, for a text that is continued, so that it does not end with EOS or the like."""
        encoded = Template.encode(self, row, tokenizer, max_length)
        end = len(encoded["input_ids"]) - len(find_special_tokens(tokenizer)[1])
        return {name: values[:end] for name, values in encoded.items()}

    def read_columns(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Return the text of each column that the template names."""
        return {name: to_text(row[name], name) for name in self.fields}

    def render(self, columns: Mapping[str, str], *, mask: str = "") -> str:
        """Return the template with the texts of its columns, and `mask` for the mask."""
        texts = {**columns, "mask": mask}
        formatter = string.Formatter()
        parts = []
        for literal, name, spec, conversion in self.parts:
            value = "" if name is None else formatter.convert_field(texts[name], conversion)
            parts += [literal, format(value, spec or "")]
        return "".join(parts)

    @staticmethod
    def shorten(columns: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, excess: int) -> dict[str, str] | None:
        """Return `columns`, of which the longest has lost `excess` tokens or so; `None` if all are empty."""
        longest = max(columns, key=lambda name: len(columns[name]))
        text = columns[longest]
        if not text:
            return None
        offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        encoded = tokenizer(text, add_special_tokens=False, **offsets)
        kept = encoded["input_ids"][: -(excess + 1)]
        if not kept:
            shorter = ""
        elif offsets:
            shorter = text[: encoded["offset_mapping"][len(kept) - 1][1]]
        else:
            shorter = tokenizer.decode(kept, skip_special_tokens=True)
        # Part of a character may come back as a whole one.
        return {**columns, longest: shorter if len(shorter) < len(text) else text[:-1]}

    def _tokenize(self, columns: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        encoded = tokenizer(self.render(columns, mask=tokenizer.mask_token if self.has_mask else ""))
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def find_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after each text, such as BOS and EOS."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    return [], []
