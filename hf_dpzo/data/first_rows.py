"""What nearly all of the first rows have in common, read under seal, so that no single row decides.

Where a data set does not state its types, they are those of its first rows. The same holds for what makes a row fail.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from hf_dpzo.data.cutting import count_tokens
from hf_dpzo.data.sealed import WithheldError, run_sealed


# The number of rows that are compared.
NUM_COMPARED_ROWS = 9


# A label that is no target, and columns of ones at what is learned, by which collators set labels.
IGNORED, TARGETS, MASKS = -100, ("labels", "label_ids"), ("assistant_masks", "completion_mask")


Judged = TypeVar("Judged")


@dataclass(frozen=True, kw_only=True)
class CommonFacts:
    """What all of the first rows but one at most have in common.

    Args:
        least_tokens: the number of tokens that each of them has at least; zero for rows without tokens.
        lack_targets: whether none of them has anything that is learned.
    """

    least_tokens: int
    lack_targets: bool


def find_common_facts(dataset: Any) -> CommonFacts:
    """Return what the first rows of `dataset`, three at least, have in common but for one; nothing if they are fewer.

    >>> rows = [{"input_ids": [5] * 9, "labels": [-100] * 9}] * 8 + [{"input_ids": [5], "labels": [5]}]
    >>> find_common_facts(rows)
    CommonFacts(least_tokens=9, lack_targets=True)
    """
    found = [facts for index in range(min(NUM_COMPARED_ROWS, len(dataset))) if (facts := _read(dataset, index))]
    if len(found) < 3:
        return CommonFacts(least_tokens=0, lack_targets=False)
    lengths = sorted(length for length, _ in found)
    return CommonFacts(least_tokens=lengths[1], lack_targets=sum(lacks for _, lacks in found) >= len(found) - 1)


def are_common(dataset: Any, judge: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Return whether `judge` holds of all of the first rows, three at least, but for one.

    >>> are_common([{"x": 1}] * 8 + [{"x": 2}], lambda row: row["x"] == 1)
    True
    """
    found = [
        answer for index in range(min(NUM_COMPARED_ROWS, len(dataset))) for answer in _judge(dataset, index, judge)
    ]
    return len(found) >= 3 and sum(found) >= len(found) - 1


def have_several_sizes(dataset: Sized, columns: Collection[str]) -> bool:
    """Return whether the first rows, three at least, are of several sizes in `columns`, whichever row is left out.

    >>> have_several_sizes([{"x": [1, 2]}] * 8 + [{"x": [1]}], ["x"])
    False
    >>> have_several_sizes([{"x": [1]}, {"x": [1, 2]}] * 4, ["x"])
    True
    """

    def measure(row: Mapping[str, Any]) -> tuple:
        return measure_sizes({name: row[name] for name in columns if name in row})

    indices = range(min(NUM_COMPARED_ROWS, len(dataset)))
    found = [sizes for index in indices for sizes in _judge(dataset, index, measure)]
    return len(found) >= 3 and max(Counter(found).values()) < len(found) - 1


def measure_sizes(row: Mapping[str, Any]) -> tuple:
    """Return the sizes of a row's values, column by column, which a collator that does not pad wants to be the same.

    >>> measure_sizes({"x": [1, 2], "y": [[1], [1, 2]]})
    (('x', (2,)), ('y', (2, (1,), (2,))))
    """
    return tuple((name, _measure(value)) for name, value in sorted(row.items()))


def _measure(value: Any) -> tuple:
    if isinstance(value, list | tuple):
        return len(value), *(_measure(part) for part in value if isinstance(part, list | tuple))
    return tuple(np.shape(value))


def _judge(dataset: Any, index: int, judge: Callable[[Mapping[str, Any]], Judged]) -> list[Judged]:
    """Return what `judge` says of a row; nothing of one that can not be read."""
    try:
        return [run_sealed("train_dataset", lambda: judge(dict(dataset[index])))]
    except WithheldError:
        return []


def _read(dataset: Any, index: int) -> tuple[int, bool] | None:
    try:
        return run_sealed("train_dataset", lambda: _describe(dict(dataset[index])))
    except WithheldError:
        return None


def _describe(row: Mapping[str, Any]) -> tuple[int, bool]:
    return (count_tokens(row) if "input_ids" in row else 0), lacks_targets(row)


def lacks_targets(row: Mapping[str, Any]) -> bool:
    """Return whether a row says which of its tokens are learned, and none is.

    >>> lacks_targets({"labels": [-100, -100]}), lacks_targets({"labels": [-100, 5]}), lacks_targets({"labels": -100})
    (True, False, True)
    >>> lacks_targets({"input_ids": [5], "assistant_masks": [0]}), lacks_targets({"input_ids": [5]})
    (True, False)
    """
    for names, nothing in ((TARGETS, IGNORED), (MASKS, 0)):
        for name in names:
            if name in row and isinstance(row[name], Sequence | torch.Tensor | np.ndarray | int):
                values = np.asarray(row[name])
                return values.dtype.kind in "iub" and bool((values == nothing).all())
    return False
