"""Neighbours of a row that are chosen to move its loss."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from hf_dpzo.losses.per_example import IGNORE_INDEX


def repeat_tokens(
    row: dict[str, Any], others: Sequence[dict[str, Any]], *, kept: Collection[int] = ()
) -> Iterator[dict[str, Any]]:
    """Yield copies of `row`, each with one token everywhere: tokens of its own, and of `others`.

    All tokens of such a copy choose the same experts of a mixture. Labels that are the tokens themselves follow them.

    Args:
        row: the row to copy, of one text or of several.
        others: the other rows.
        kept: tokens that stay where they are, such as the end of a text, of which a head wants as many in each row.

    >>> row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    >>> [copy["labels"] for copy in repeat_tokens(row, [])]
    [[-100, 5, 5], [-100, 7, 7]]
    >>> [copy["input_ids"] for copy in repeat_tokens({"input_ids": [[5, 1], [6, 7, 1]]}, [], kept=[1])]
    [[[5, 1], [5, 5, 1]], [[7, 1], [7, 7, 1]]]
    """
    own = row.get("input_ids")
    flat, *rest = ([token for token in _flatten(text) if token not in kept] for text in _list_texts(row, others[:2]))
    if not flat:
        return
    firsts = [token for text in rest for token in text[:1]]
    for token in dict.fromkeys([flat[0], flat[-1], *firsts]):
        repeated = copy.deepcopy(row)
        repeated["input_ids"] = _fill(own, token, kept)
        labels = row.get("labels")
        if isinstance(labels, list) and all(
            pair[0] in (IGNORE_INDEX, pair[1]) for pair in zip(labels, own, strict=False)
        ):
            repeated["labels"] = [label if label in (IGNORE_INDEX, *kept) else token for label in labels]
        yield repeated


def _list_texts(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [one.get("input_ids") for one in (row, *others)]


def _flatten(tokens: Any) -> list[int]:
    """Return all tokens in a list, an array or a tensor, however nested, in order."""
    if tokens is None:
        return []
    if isinstance(tokens, list | tuple) and tokens and isinstance(tokens[0], list | tuple):
        return [token for part in tokens for token in _flatten(part)]
    return [int(token) for token in torch.as_tensor(tokens).flatten()]


def _fill(tokens: Any, token: int, kept: Collection[int]) -> Any:
    """Return `tokens` with `token` in place of each that is not kept."""
    if isinstance(tokens, list | tuple):
        return [_fill(part, token, kept) for part in tokens]
    if isinstance(tokens, int):
        return tokens if tokens in kept else token
    filled = tokens * 0 + token
    for place in kept:
        filled[tokens == place] = place
    return filled
