"""Rows of preference data: two texts that are one example, by the names of columns that TRL gives them."""

from collections.abc import Callable, Collection, Mapping
from typing import Any


# The columns of the two texts, and the one of what they have in common.
CHOSEN, REJECTED, PROMPT = "chosen_ids", "rejected_ids", "prompt_ids"


# The columns that hold the tokens of a text.
TEXT_COLUMNS = ("input_ids", PROMPT, CHOSEN, REJECTED)


def is_pair(row: Any) -> bool:
    """Return whether a row, or a collection of the names of columns, is that of a preferred and another text.

    >>> is_pair({"chosen_ids": [5], "rejected_ids": [6]}), is_pair({"input_ids": [5]})
    (True, False)
    """
    return isinstance(row, Collection) and CHOSEN in row and REJECTED in row


def list_sequences(row: Mapping[str, Any]) -> list[list[int]]:
    """Return the token sequences that a model reads for a pair: the preferred text and the other one.

    >>> list_sequences({"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]})
    [[5, 6, 7], [5, 8]]
    """
    prompt = list(row.get(PROMPT, ()))
    return [[*prompt, *row[CHOSEN]], [*prompt, *row[REJECTED]]]


def split_pair(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row of tokens for each text of a pair; of what is no pair, the row itself.

    >>> split_pair({"chosen_ids": [6, 7], "rejected_ids": [8], "margin": 0.5})
    [{'input_ids': [6, 7]}, {'input_ids': [8]}]
    """
    return [{"input_ids": tokens} for tokens in list_sequences(row)] if is_pair(row) else [row]


def stretch_pair(row: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a pair like `row` whose preferred text has `length` tokens: its first one is repeated.

    >>> stretch_pair({"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}, 4)
    {'prompt_ids': [5], 'chosen_ids': [6, 6, 7], 'rejected_ids': [8]}
    """
    chosen = list(row[CHOSEN])
    missing = length - len(row.get(PROMPT, ())) - len(chosen)
    return {**row, CHOSEN: [*chosen[:1] * missing, *chosen]}


def assign_tokens(names: Collection[str], generate: Callable[[], list[int]]) -> dict[str, list[int]]:
    """Return for each column of a made-up row the tokens that belong to it: those of its text, or of the whole row.

    Of a pair, the preferred text has all tokens that were generated, and the other is shorter and begins like it.

    Args:
        names: the names of the row's columns.
        generate: a function that generates the tokens of a text, called only where a column holds some.

    >>> texts = iter([[5, 6, 7, 8], [1, 2, 3, 4]])
    >>> assign_tokens(["prompt_ids", "chosen_ids", "rejected_ids"], lambda: next(texts))
    {'prompt_ids': [5, 6], 'chosen_ids': [7, 8], 'rejected_ids': [3]}
    """
    tokens = generate() if {*names} & {*TEXT_COLUMNS} else []
    if not is_pair(names):
        return dict.fromkeys(names, tokens)
    start = len(tokens) // 2 if PROMPT in names else 0
    rejected = generate()[start:][: max(1, (len(tokens) - start) * 2 // 3)]
    parts = {PROMPT: tokens[:start], CHOSEN: tokens[start:], REJECTED: rejected}
    return {name: parts.get(name, tokens) for name in names}
