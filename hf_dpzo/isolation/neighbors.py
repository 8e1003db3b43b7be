"""Neighbours of a row that are chosen to move its loss."""

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from hf_dpzo.data.pairs import CHOSEN, PROMPT, REJECTED, is_pair, list_sequences
from hf_dpzo.losses.per_example import IGNORE_INDEX


def find_end_token(config: Any) -> int | None:
    """Return the token that ends each row of a model with an encoder and a decoder; `None` for any other model.

    Some of their heads read what stands at the end of a text, and want as many such tokens in each row.
    """
    end = getattr(config, "eos_token_id", None)
    return end if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) else None


def repeat_tokens(
    row: dict[str, Any], others: Sequence[dict[str, Any]], *, kept: Collection[int] = ()
) -> Iterator[dict[str, Any]]:
    """Yield copies of `row`, each with one token everywhere: tokens of its own, and of `others`.

    All tokens of such a copy choose the same experts of a mixture. Labels that are the tokens themselves follow them.

    Args:
        row: the row to copy, of one text or of several.
        others: the other rows.
        kept: tokens that stay where they are, such as the end of a text, of which a head wants as many in each row, or
            those that activate an adapter.

    >>> row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    >>> [copy["labels"] for copy in repeat_tokens(row, [])]
    [[-100, 5, 5], [-100, 7, 7]]
    >>> [copy["input_ids"] for copy in repeat_tokens({"input_ids": [[5, 1], [6, 7, 1]]}, [], kept=[1])]
    [[[5, 1], [5, 5, 1]], [[7, 1], [7, 7, 1]]]
    """
    if is_pair(row):
        yield from _repeat_in_pair(row, others, kept)
        return
    own = row.get("input_ids")
    texts = (one.get("input_ids") for one in (row, *others[:2]))
    flat, *rest = ([token for token in _flatten(text) if token not in kept] for text in texts)
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


def _repeat_in_pair(
    row: dict[str, Any], others: Sequence[dict[str, Any]], kept: Collection[int]
) -> Iterator[dict[str, Any]]:
    """Yield copies of a pair of texts, each with one token everywhere in both but at those that are kept."""
    texts = (sequence for pair in (row, *others[:2]) for sequence in list_sequences(pair))
    firsts = [token for text in texts for token in [token for token in map(int, text) if token not in kept][:1]]
    names = [name for name in (PROMPT, CHOSEN, REJECTED) if name in row]
    for token in dict.fromkeys(firsts):
        yield copy.deepcopy(row) | {name: [int(one) if one in kept else token for one in row[name]] for name in names}


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
