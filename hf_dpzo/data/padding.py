"""The collator of rows for which none was passed: stock's, which also pads labels that are as long as their row."""

from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding

from hf_dpzo.data.first_rows import IGNORED, TARGETS


class PaddingCollator(DataCollatorWithPadding):
    """Stock's default collator of rows with a tokenizer, which pads labels too where they have several lengths.

    Stock pads what the tokenizer names, and fails on lists of labels, unless they are all of one length. As in
    `DataCollatorForSeq2Seq` and `DataCollatorForTokenClassification`, what is added is -100, on the tokenizer's side.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the padded inputs of rows."""
        rows = [dict(row) for row in features]
        for name in TARGETS:
            lists = [_read_classes(row.get(name)) for row in rows]
            if None not in lists and len({*map(len, lists)}) > 1:
                for row, padded in zip(rows, _pad(lists, on_left=self.tokenizer.padding_side == "left"), strict=True):
                    row[name] = padded
        return super().__call__(rows)


def _read_classes(value: Any) -> list[int] | None:
    """Return a list, an array or a tensor of whole numbers as a list; `None` for anything else."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    return value if isinstance(value, list) and all(isinstance(item, int) for item in value) else None


def _pad(lists: list[list[int]], *, on_left: bool) -> list[list[int]]:
    longest = max(map(len, lists))
    added = [[IGNORED] * (longest - len(one)) for one in lists]
    return [[*more, *one] if on_left else [*one, *more] for one, more in zip(lists, added, strict=True)]
