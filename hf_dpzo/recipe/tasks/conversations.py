"""Conversations as tokens, by the chat template of a tokenizer."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from hf_dpzo.data.cells import drop_missing, to_text
from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.exchanges import Messages, drop_unanswered


T = TypeVar("T")


# As in ShareGPT's files.
_OTHER_NAMES = {"from": "role", "value": "content"}
_OTHER_ROLES = {"human": "user", "gpt": "assistant"}


# Types of parts that are named in messages. Others may be private.
_OTHER_PARTS = ("audio", "file", "image", "image_url", "input_audio", "thinking", "tool_result", "tool_use", "video")


_EXAMPLE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]


def read_messages(cell: Any, column: str) -> Messages:
    """Return the messages in a cell, each with `role` and `content`; ShareGPT's `from` and `value` are read too.

    The content is a text, or a list of parts of type text. Fields without a value are left out at every depth.

    Raises:
        ValueError: the cell holds no list of messages, or a content is no text.

    >>> read_messages([{"from": "human", "value": "Hello", "name": None}], "messages")
    [{'role': 'user', 'content': 'Hello'}]
    >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hi", "image": None}]}], "messages")
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]
    """
    if not isinstance(cell, list) or not all(isinstance(message, dict) for message in cell):
        raise ValueError(
            f"column={column}: it holds no list of messages; give it one, with role and content, or choose causal-lm."
        )
    messages = []
    for message in drop_missing(cell):
        present = {_OTHER_NAMES.get(name, name): value for name, value in message.items()}
        role = present.get("role")
        if not isinstance(role, str):
            raise ValueError(f"column={column}: a message has no role; give each a role and a content.")
        content = _read_content(present.get("content", ""), column)
        messages.append({**present, "role": _OTHER_ROLES.get(role, role), "content": content})
    return messages


def _read_content(content: Any, column: str) -> str | list[dict[str, str]]:
    if isinstance(content, list):
        return [{"type": "text", "text": _read_part(part, column)} for part in content]
    if isinstance(content, dict):
        raise ValueError(f"column={column}: the content of a message is a dictionary; give each a text, or a list.")
    return to_text(content, column)


def _read_part(part: Any, column: str) -> str:
    """Return the text of one part of a content."""
    kind = "text"
    if isinstance(part, dict):
        kind, part = part.get("type", "text"), part.get("text")
    if kind != "text" or not isinstance(part, str):
        named = f"type {kind}" if kind in _OTHER_PARTS else "another type than text"
        raise ValueError(
            f"column={column}: a message has a part of {named}, and only texts are learned; leave such parts out."
        )
    return part


def refuse_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for a tokenizer without a chat template, or with one that does not show what is learned."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "task=chat: this tokenizer has no chat template; name the model's chat version, or save one as "
            "chat_template.jinja beside the tokenizer."
        )
    _, learned = _explain(tokenizer, lambda: _mark_turns(_fit_contents(_EXAMPLE, tokenizer), tokenizer))
    if not any(learned):
        raise ValueError(
            "task=chat: the chat template does not show where the assistant's turns begin; put {% generation %} and "
            "{% endgeneration %} around them in it."
        )


def find_turn_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens by which the chat template begins an assistant's turn: its generation prompt, within a row.

    What a template writes only where an answer is asked for, such as an empty thought, is not among them.

    Raises:
        ValueError: the chat template has no generation prompt, or answers do not begin with it.
    """
    messages = _fit_contents(_EXAMPLE, tokenizer)
    plain = _explain(tokenizer, lambda: _apply(messages[:1], tokenizer))
    asked = _explain(tokenizer, lambda: _apply(messages[:1], tokenizer, asks=True))
    row = encode_conversation(_EXAMPLE, tokenizer, max_length=len(asked) + 64)["input_ids"]
    start, end = _count_common(plain, asked), _count_common(asked, row)
    if start >= end:
        raise ValueError(
            "adapter=activated-lora: the chat template has no generation prompt that answers begin with, by which the "
            "adapter could be activated; save one that has as chat_template.jinja beside the tokenizer, or choose lora."
        )
    return asked[start:end]


def encode_conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels` of a conversation; the assistant's turns are learned.

    Turns of the assistant that say nothing are left out, with what was asked before them. If the conversation is too
    long, it loses its first turns, but for the system's, then the end of the longest text before the first answer,
    which has at least half of the room, and then the end of what is left.

    Raises:
        ValueError: the chat template refuses the conversation. The message holds nothing of it.
    """
    answered = drop_unanswered(messages)
    tokens, learned = _explain(
        tokenizer, lambda: _mark_fitting(_fit_contents(answered, tokenizer), tokenizer, max_length)
    )
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [token if marked else IGNORE_INDEX for token, marked in zip(tokens, learned, strict=True)],
    }


def encode_question(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask` of a conversation, up to where the assistant answers next.

    Raises:
        ValueError: the chat template refuses the conversation. The message holds nothing of it.
    """
    answered = drop_unanswered(messages)
    fitting = _explain(tokenizer, lambda: _fit_contents(answered, tokenizer))
    tokens = _explain(tokenizer, lambda: _apply(fitting, tokenizer, asks=True))
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}


def _explain(tokenizer: PreTrainedTokenizerBase, write: Callable[[], T]) -> T:
    """Return what `write` returns, or raise one sentence where the template fails, with no text but the template's."""
    try:
        return write()
    except Exception as error:
        said, kind = str(error), type(error).__name__
    # What a template says is public if it is written there, and may hold a value of the row if not.
    is_public = any(f"{quote}{said}{quote}" in str(tokenizer.chat_template) for quote in "'\"")
    raise ValueError(
        f"task=chat: the chat template refuses a conversation ({said if said and is_public else kind}); change its "
        "messages, or save another template as chat_template.jinja beside the tokenizer."
    )


def _fit_contents(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Messages:
    """Return the messages with contents as the template takes them: as parts, or as one text."""
    takes_text, takes_parts = _find_forms(tokenizer, str(tokenizer.chat_template))
    fitting = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list) and not takes_parts:
            content = "".join(part["text"] for part in content)
        elif isinstance(content, str) and takes_parts and not takes_text:
            content = [{"type": "text", "text": content}]
        fitting.append({**message, "content": content})
    return fitting


@lru_cache(maxsize=4)
def _find_forms(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[bool, bool]:
    """Return whether the template writes contents that are texts, and contents that are lists of parts."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in _EXAMPLE]
    as_text, as_parts = _render(_EXAMPLE, tokenizer), _render(parts, tokenizer)
    takes_text = all(message["content"] in as_text for message in _EXAMPLE)
    takes_parts = all(message["content"] in as_parts for message in _EXAMPLE)
    return takes_text, as_parts == as_text if takes_text else takes_parts


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a conversation; none if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return ""


def _mark_fitting(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[bool]]:
    """Return at most `max_length` tokens of a conversation, and which of them the assistant writes."""
    if not messages:
        return [], []
    tokens, learned = _mark_turns(messages, tokenizer)
    while len(tokens) > max_length and (shorter := _drop_first_exchange(messages)) is not None:
        messages = shorter
        tokens, learned = _mark_turns(messages, tokenizer)
    while (excess := _count_excess(learned, max_length)) > 0 and (
        shorter := _shorten_prompt(messages, tokenizer, excess)
    ) is not None:
        messages = shorter
        tokens, learned = _mark_turns(messages, tokenizer)
    return tokens[:max_length], learned[:max_length]


def _count_excess(learned: Sequence[bool], max_length: int) -> int:
    """Return how many tokens in front of the first that is learned have no room; half of the room is for the others."""
    asked = learned.index(True) if True in learned else 0
    return min(asked - max_length // 2, len(learned) - max_length)


def _shorten_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase, excess: int) -> Messages | None:
    """Return the conversation, of which the longest text before the first answer has lost `excess` tokens or so."""
    answers = (place for place, message in enumerate(messages) if place > 0 and message["role"] == "assistant")
    asked = messages[: next(answers, 0)]
    texts = {
        str(place): message["content"] for place, message in enumerate(asked) if isinstance(message["content"], str)
    }
    shorter = Template.shorten(texts, tokenizer, excess - 1) if texts else None
    if shorter is None:
        return None
    return [
        {**message, "content": shorter.get(str(place), message["content"])} for place, message in enumerate(messages)
    ]


def _drop_first_exchange(messages: Messages) -> Messages | None:
    """Return the conversation from its second user's turn on, after the system's; `None` if there is no such turn."""
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if len(asked) < 2:
        return None
    kept = [message for message in messages[: asked[0]] if message["role"] == "system"]
    return [*kept, *messages[asked[1] :]]


def _mark_turns(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which of them the assistant writes."""
    if re.search(r"\{%[-+]?\s*generation\b", str(tokenizer.chat_template)):
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    tokens = _apply(messages, tokenizer)
    learned = [False] * len(tokens)
    for place, message in enumerate(messages):
        # The first message is no answer to anything.
        if message["role"] == "assistant" and place > 0:
            asked = _apply(messages[:place], tokenizer, asks=True)
            answered = _apply(messages[: place + 1], tokenizer)
            # A template may leave out parts of earlier turns. Then only the turns that stay are learned.
            if tokens[: len(asked)] == asked and answered[: len(asked)] == asked:
                end = _count_common(tokens, answered)
                learned[len(asked) : end] = [True] * (end - len(asked))
    return tokens, learned


def _apply(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, asks: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=asks)
    return list(encoded["input_ids"])


def _count_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two lists begin with in common."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
