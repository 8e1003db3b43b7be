"""Conversations as tokens, by the chat template of a tokenizer."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_dpzo.data.cells import is_missing
from hf_dpzo.recipe.tasks.metrics import IGNORED


Messages = list[dict[str, Any]]


# As in ShareGPT's files.
_OTHER_NAMES = {"from": "role", "value": "content"}
_OTHER_ROLES = {"human": "user", "gpt": "assistant"}


_EXAMPLE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]


def read_messages(cell: Any, column: str) -> Messages:
    """Return the messages in a cell, each with `role` and `content`; ShareGPT's `from` and `value` are read too.

    Raises:
        ValueError: the cell holds no list of messages.

    >>> read_messages([{"from": "human", "value": "Hello", "name": None}], "messages")
    [{'role': 'user', 'content': 'Hello'}]
    """
    if not isinstance(cell, list) or not all(isinstance(message, dict) for message in cell):
        raise ValueError(
            f"column={column}: it holds no list of messages; give it one, with role and content, or choose causal-lm."
        )
    messages = []
    for message in cell:
        present = {_OTHER_NAMES.get(name, name): value for name, value in message.items() if not is_missing(value)}
        if "role" not in present:
            raise ValueError(f"column={column}: a message has no role; give each a role and a content.")
        role = str(present["role"])
        messages.append({**present, "role": _OTHER_ROLES.get(role, role), "content": present.get("content", "")})
    return messages


def refuse_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for a tokenizer without a chat template, or with one that does not show what is learned."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "task=chat: this tokenizer has no chat template; name the model's chat version, or save one as "
            "chat_template.jinja beside the tokenizer."
        )
    if not any(_mark_turns(_EXAMPLE, tokenizer)[1]):
        raise ValueError(
            "task=chat: the chat template does not show where the assistant's turns begin; put {% generation %} and "
            "{% endgeneration %} around them in it."
        )


def encode_conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels` of a conversation; the assistant's turns are learned.

    If it is too long, it loses its first turns, but for the system's, and then the end of what is left.
    """
    tokens, learned = _mark_turns(messages, tokenizer)
    while len(tokens) > max_length and (shorter := _drop_first_exchange(messages)) is not None:
        messages = shorter
        tokens, learned = _mark_turns(messages, tokenizer)
    tokens, learned = tokens[:max_length], learned[:max_length]
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [token if marked else IGNORED for token, marked in zip(tokens, learned, strict=True)],
    }


def _drop_first_exchange(messages: Messages) -> Messages | None:
    """Return the conversation from its second user's turn on, after the system's; `None` if there is no such turn."""
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if len(asked) < 2:
        return None
    kept = [message for message in messages[: asked[0]] if message["role"] == "system"]
    return [*kept, *messages[asked[1] :]]


def _mark_turns(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which of them the assistant writes."""
    if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
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
