"""Neighbours of a row that are chosen to move its loss."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hf_dpzo.data.pairs import CHOSEN, PROMPT, REJECTED, is_pair, list_sequences
from hf_dpzo.losses.output_layer import IGNORE_INDEX


def repeat_tokens(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield copies of `row`, each with one token everywhere: tokens of its own, and of `others`.

    All tokens of such a copy choose the same experts of a mixture. Labels that are the tokens themselves follow them.

    >>> row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    >>> [copy["labels"] for copy in repeat_tokens(row, [])]
    [[-100, 5, 5], [-100, 7, 7]]
    """
    if is_pair(row):
        yield from _repeat_in_pair(row, others)
        return
    own = row.get("input_ids")
    if own is None or not len(own):
        return
    firsts = [other["input_ids"][0] for other in others[:2] if len(other["input_ids"])]
    for token in dict.fromkeys(map(int, [own[0], own[-1], *firsts])):
        repeated = copy.deepcopy(row)
        repeated["input_ids"] = [token] * len(own) if isinstance(own, list) else own * 0 + token
        labels = row.get("labels")
        if isinstance(labels, list) and all(
            pair[0] in (IGNORE_INDEX, pair[1]) for pair in zip(labels, own, strict=False)
        ):
            repeated["labels"] = [label if label == IGNORE_INDEX else token for label in labels]
        yield repeated


def _repeat_in_pair(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield copies of a pair of texts, each with one token everywhere in both."""
    firsts = [sequence[0] for pair in (row, *others[:2]) for sequence in list_sequences(pair) if len(sequence)]
    names = [name for name in (PROMPT, CHOSEN, REJECTED) if name in row]
    for token in dict.fromkeys(map(int, firsts)):
        yield copy.deepcopy(row) | {name: [token] * len(row[name]) for name in names}
