"""A prompt and the response to it, as the tokens of one text."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.losses.template import Template, find_special_tokens


def encode_response(
    template: Template,
    response: Template,
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels` of a prompt with its response.

    Both are one text: BOS is at its beginning if the tokenizer puts one there, and EOS once at its end. If a token
    would reach from the prompt into the response, each is cut into tokens by itself, since the prompt has to be the one
    that the model is asked later. The response, with EOS, is learned.

    The response has the room that the prompt leaves, and at least half of it. A prompt that is too long for what is
    left loses the end of its longest column.

    The template alone must leave room for a response: see `refuse_full_prompt`.
    """
    before, _ = find_special_tokens(tokenizer)
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    room = max_length - len(before) - len(after)
    columns = template.read_columns(row)
    answer = response.render(response.read_columns(row))
    prompt = _tokenize(template.render(columns), tokenizer, before)
    learned = _strip_end(_continue(template.render(columns), prompt, answer, tokenizer, before), after)
    fixed = _count_fixed(template, tokenizer, before)
    learned = learned[: min(max(room // 2, room - len(prompt)), room - fixed)]
    while len(prompt) > room - len(learned):
        shorter = template.shorten(columns, tokenizer, len(prompt) - (room - len(learned)))
        if shorter is None:
            prompt = prompt[: room - len(learned)]
        else:
            columns, prompt = shorter, _tokenize(template.render(shorter), tokenizer, before)
    tokens = [*before, *prompt, *learned, *after]
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [IGNORE_INDEX] * (len(before) + len(prompt)) + [*learned, *after],
    }


def refuse_full_prompt(template: Template, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
    """Raise `ValueError` if the template alone leaves no room for a token of a response and EOS."""
    before, _ = find_special_tokens(tokenizer)
    needed = len(before) + _count_fixed(template, tokenizer, before) + 2
    if needed > max_length:
        raise ValueError(
            f"max_length={max_length}: the template alone leaves no room for a response; set {needed} at least."
        )


def _count_fixed(template: Template, tokenizer: PreTrainedTokenizerBase, before: list[int]) -> int:
    """Return the number of tokens of a template whose columns are empty."""
    return len(_tokenize(template.render(dict.fromkeys(template.fields, "")), tokenizer, before))


def _continue(
    text: str, prompt: list[int], answer: str, tokenizer: PreTrainedTokenizerBase, before: list[int]
) -> list[int]:
    """Return the tokens of `answer` after those of the prompt `text`."""
    whole = _tokenize(text + answer, tokenizer, before)
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else _tokenize(answer, tokenizer, [])


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, before: list[int]) -> list[int]:
    """Return the tokens of a text alone; those in `before` that it begins with are not repeated."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens[len(before) :] if before and tokens[: len(before)] == before else tokens


def _strip_end(tokens: list[int], end: list[int]) -> list[int]:
    while end and tokens[-1:] == end:
        tokens = tokens[:-1]
    return tokens
