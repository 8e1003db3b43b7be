"""The tokens that activate a recipe's adapter, as they are written within its rows.

Within a row a text may become other tokens than alone. So rows are made up and encoded as those of the data are, and
the tokens are those that the text has in all of them.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import PreTrainedTokenizerBase

from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.losses.template import Template
from hf_dpzo.models.activation import locate_invocation
from hf_dpzo.recipe.tasks.conversations import find_turn_start


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


ACTIVATED = "activated-lora"


# What a column may end with: letters, digits, marks, spaces and nothing, which tokens may join to what follows.
_TEXTS = (
    "a word",
    "a number 12",
    "a mark.",
    "marks!?",
    'a quotation"',
    "a space ",
    "a line\n",
    "caf\u00e9",
    "\u4e2d",
    "",
)


def check_activation(recipe: "Recipe") -> None:
    """Raise `ValueError` for a recipe that asks for an activated adapter where there is none, or says nowhere where."""
    if recipe.adapter != ACTIVATED:
        if recipe.lora_invocation is not None:
            raise ValueError(
                f"lora_invocation={recipe.lora_invocation!r}: adapter={recipe.adapter} is always active; choose "
                f"adapter={ACTIVATED}, or leave it out."
            )
        return
    if recipe.kind.peft_type(recipe) != TaskType.CAUSAL_LM:
        raise ValueError(
            f"adapter={ACTIVATED}: it is for causal language models, and task={recipe.task} trains another one here; "
            "choose lora."
        )
    if recipe.task == "chat":
        if recipe.lora_invocation is not None:
            raise ValueError(
                f"lora_invocation={recipe.lora_invocation!r}: in task=chat the beginning of the assistant's turn "
                "activates the adapter; leave it out."
            )
        return
    written = "".join(literal for literal, *_ in Template(template=recipe.template).parts)
    if not _find_text(recipe).strip():
        raise ValueError(
            f"template={recipe.template!r}: no text stands after its last column, and some must, to activate the "
            "adapter; end it with a text, such as ' It was', or name one of it in lora_invocation."
        )
    if _find_text(recipe) not in written:
        raise ValueError(
            f"lora_invocation={recipe.lora_invocation!r}: the template does not hold it, so that no row would activate "
            "the adapter; name a part of its text."
        )


def _find_text(recipe: "Recipe") -> str:
    """Return the text that activates the adapter: the one that is named, or what stands after the last column."""
    if recipe.lora_invocation is not None:
        return recipe.lora_invocation
    literal, name, *_ = Template(template=recipe.template).parts[-1]
    return literal if name is None else ""


def find_invocation_tokens(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return the tokens that activate the adapter in each row of `recipe`; `None` for an adapter that always is.

    In task `chat` they are those by which the chat template begins an assistant's turn.

    Raises:
        ValueError: rows have no such tokens in common, or the chat template has no generation prompt.
    """
    if recipe.adapter != ACTIVATED:
        return None
    if recipe.task == "chat":
        return find_turn_start(tokenizer)
    text = _find_text(recipe)
    rows = [recipe.kind.encode(_make_up_row(recipe, column), recipe, tokenizer)["input_ids"] for column in _TEXTS]
    runs = [_find_run(tokens, text, tokenizer) for tokens in rows]
    common = runs[0]
    for run in runs[1:]:
        common = _find_common(common, run)
    common = _drop_spaces(common, text, tokenizer)
    if not common:
        raise ValueError(
            f"lora_invocation={text!r}: this tokenizer writes it by other tokens in each row, or does not know it; "
            "name a longer text of the template."
        )
    return common


def find_ending(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that each row of `recipe` ends with, if they hold those that activate its adapter.

    They are what stands after the last column of its template, so that they are public.
    """
    invocation = find_invocation_tokens(recipe, tokenizer)
    if invocation is None or recipe.task == "chat":
        return ()
    texts = (*_TEXTS, *(f"{text} " * recipe.max_length for text in _TEXTS[:2]))
    rows = [recipe.kind.encode(_make_up_row(recipe, text), recipe, tokenizer)["input_ids"] for text in texts]
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*map(reversed, rows), strict=False))
    ending = [tokens[0] for tokens in alike][::-1]
    return tuple(ending) if locate_invocation(torch.tensor([ending]), invocation) >= 0 else ()


def ignore_base_tokens(row: Mapping[str, Any], invocation: Sequence[int]) -> dict[str, Any]:
    """Return an encoded row without the labels that the base model predicts, from which nothing is learned.

    They are those up to the first token of the last invocation, such as the earlier turns of a conversation.

    >>> ignore_base_tokens({"input_ids": [1, 5, 2, 5, 3], "labels": [-100, -100, 2, 5, 3]}, [5])["labels"]
    [-100, -100, -100, -100, 3]
    """
    tokens, labels = row.get("input_ids"), row.get("labels")
    if not isinstance(labels, list) or not tokens or len(labels) != len(tokens):
        return dict(row)
    count = int(locate_invocation(torch.tensor([tokens]), invocation)) + 1
    return {**row, "labels": [IGNORE_INDEX] * count + labels[count:]}


def _make_up_row(recipe: "Recipe", text: str) -> dict[str, Any]:
    label = {recipe.label_column: recipe.labels[0]} if recipe.labels else {}
    return {**dict.fromkeys(recipe.used_columns, text), **label}


def _find_run(tokens: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the run of tokens that write most of `text` and nothing else, the last of several.

    A run of spaces, however long, writes nothing of a text that has letters or marks.
    """
    wanted, found, most = _normalize(text), [], 0
    start = 0
    for end in range(1, len(tokens) + 1):
        while start < end and _normalize(tokenizer.decode(list(tokens[start:end]))) not in wanted:
            start += 1
        written = len(_normalize(tokenizer.decode(list(tokens[start:end]))))
        if written >= most:
            found, most = list(tokens[start:end]), written
    return found


def _drop_spaces(tokens: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return `tokens` without spaces at an end at which `text` has none."""
    while tokens and not text[0].isspace() and not tokenizer.decode(tokens[:1]).strip():
        tokens = tokens[1:]
    while tokens and not text[-1].isspace() and not tokenizer.decode(tokens[-1:]).strip():
        tokens = tokens[:-1]
    return tokens


def _normalize(text: str) -> str:
    """Return `text` without the spaces and the case that a tokenizer may change.

    >>> _normalize(" It was")
    'itwas'
    """
    return "".join(text.split()).casefold()


def _find_common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the longest run of tokens that both lists have.

    >>> _find_common([7, 5, 6], [5, 6, 8])
    [5, 6]
    """
    runs = (list(one[start:end]) for start in range(len(one)) for end in range(start + 1, len(one) + 1))
    held = [run for run in runs if any(list(other[i : i + len(run)]) == run for i in range(len(other)))]
    return max(held, key=len, default=[])
