"""Rows that only fill a micro-batch up to its public shape."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from hf_dpzo.data.cutting import count_tokens
from hf_dpzo.data.first_rows import IGNORED, TARGETS
from hf_dpzo.data.pairs import is_pair, stretch_pair


# The field with the samples of a sound.
WAVE_FIELD = "input_values"


def stretch_row(
    row: dict[str, Any], length: int, *, kept: int = 0, written_fields: Collection[str] = ()
) -> dict[str, Any]:
    """Return a row like `row`, of `length` tokens: an entry near the front of each field of its tokens is repeated.

    So it has as many ends, masks and other special tokens as `row`, of which some heads want the same number in all. Of
    targets, where some tokens have none, it has the last: a target may cost a product with all words of a vocabulary.

    Args:
        row: the row, of one text or of several.
        length: the number of tokens, of each text if there are several.
        kept: the number of tokens at the front that stay where they are; of a pair of texts, none.
        written_fields: fields with tokens that a decoder writes, which get the same length.

    >>> stretch_row({"input_ids": [5, 6], "labels": 1}, 3)
    {'input_ids': [5, 5, 6], 'labels': 1}
    >>> stretch_row({"input_ids": [5, 6, 7]}, 5, kept=2)
    {'input_ids': [5, 6, 6, 6, 7]}
    >>> stretch_row({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, 4)["labels"]
    [-100, -100, -100, 7]
    """
    if is_pair(row):
        return stretch_pair(row, length)
    tokens = count_tokens(row)
    stretched = {*written_fields, *((WAVE_FIELD,) if np.ndim(row.get(WAVE_FIELD, 0)) == 1 else ())}
    filler = {
        name: _stretch(value, length, kept) if name in stretched or _is_per_token(value, tokens) else value
        for name, value in row.items()
    }
    for name in {*TARGETS} & {*row} - {*written_fields}:
        if np.ndim(row[name]) == 1 and _is_per_token(row[name], tokens):
            filler[name] = _keep_last_target(filler[name])
    return filler


def _is_per_token(value: Any, tokens: int) -> bool:
    """Return whether `value` has an integer for each token. Floats are something else, such as a row's many labels."""
    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and value.shape[-1] == tokens and not value.is_floating_point()
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return max(map(len, value)) == tokens
    return len(value) == tokens and isinstance(value[0], int)


def _keep_last_target(labels: Any) -> Any:
    """Return `labels`, a list or a tensor, with the last target alone, if some tokens have none."""
    numbers = [*map(int, labels)]
    places = [place for place, label in enumerate(numbers) if label != IGNORED]
    if len(places) in (0, len(numbers)):
        return labels
    last = [label if place == places[-1] else IGNORED for place, label in enumerate(numbers)]
    return labels.new_tensor(last) if isinstance(labels, torch.Tensor) else last


def _stretch(value: Any, length: int, kept: int) -> Any:
    """Return `value`, or each of several lists in it, with an entry repeated until there are `length`.

    It is the last of the `kept` entries at the front: the first if none is kept, the last of all if there are fewer.
    """
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [_stretch(one, length, kept) for one in value]
    tokens = value.shape[-1] if isinstance(value, torch.Tensor | np.ndarray) else len(value)
    place, missing = max(0, min(kept, tokens) - 1), max(0, length - tokens)
    if isinstance(value, np.ndarray):
        return np.concatenate([value[:place], np.repeat(value[place : place + 1], missing), value[place:]])
    if not isinstance(value, torch.Tensor):
        return [*value[:place], *value[place : place + 1] * missing, *value[place:]]
    repeated = value[..., place : place + 1]
    repeated = repeated.expand(*repeated.shape[:-1], missing)
    return torch.cat([value[..., :place], repeated, value[..., place:]], dim=-1)
