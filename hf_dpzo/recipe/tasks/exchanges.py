"""Exchanges of a conversation: what is asked, and what the assistant answers, where it says anything."""

from collections.abc import Iterable, Mapping
from typing import Any


Messages = list[dict[str, Any]]


# What an assistant's turn may hold in place of a content, and templates write.
_CALLS = ("tool_calls", "function_call", "reasoning_content", "thinking")


def answers(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether the assistant says anything in a conversation.

    >>> answers([{"role": "user", "content": "Hello"}]), answers([{"role": "assistant", "content": "Hello"}])
    (False, True)
    """
    return any(message["role"] == "assistant" and _says_anything(message) for message in messages)


def drop_unanswered(messages: Messages) -> Messages:
    """Return a conversation without the assistant's turns that say nothing, and without what was asked before these.

    An empty answer is one that is missing: if it were learned, the model would learn to say nothing. What is asked last
    stays.

    >>> talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}]
    >>> drop_unanswered(talk + [{"role": "user", "content": "Hello?"}])
    [{'role': 'user', 'content': 'Hello?'}]
    """
    kept: Messages = []
    for message in messages:
        if message["role"] != "assistant" or _says_anything(message):
            kept.append(message)
        elif kept and kept[-1]["role"] != "assistant":
            kept = kept[: _find_question(kept)]
    return kept


def drop_answer(messages: Messages) -> Messages:
    """Return a conversation up to what the assistant is asked last, without what it answers to that.

    >>> drop_answer([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}])
    [{'role': 'user', 'content': 'Hello'}]
    """
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _says_anything(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return any(texts) or any(message.get(name) for name in _CALLS)


def _find_question(messages: Messages) -> int:
    """Return the place of the first of the user's turns that `messages` end with, or of the last of all without one."""
    place = len(messages)
    while place > 1 and messages[place - 1]["role"] != "user":
        place -= 1
    while place > 1 and messages[place - 2]["role"] == "user":
        place -= 1
    return place - 1
