"""Canaries: public rows that are in the training data or not, by secret coins, so that a run can be audited.

Each canary has a number of its own among the rows, whether it is in or out. One that is out is a row without content,
which contributes nothing, like a row that cannot be read. So the number of rows, the sampling rate and all that is
accounted are the same whatever the coins are, and neighbours differ by one row that was added or removed.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_dpzo.auditing.coins import Coins
from hf_dpzo.data.sampling import DrawnRow, FetchedRow, SealedRows
from hf_dpzo.isolation.synthetic_rows import generate_rows


Rows = Sequence[Mapping[str, Any]]


# Tokens of a canary: few, because each costs a forward pass at every probe point of every step.
CANARY_LENGTH = 8


def generate_canaries(
    dataset: Any, model: torch.nn.Module, *, count: int, longest: int | None, kept_columns: Collection[str]
) -> Rows:
    """Return `count` rows of random tokens in the format of `dataset`, the same each time.

    Args:
        dataset: the training rows, of which only the types are read.
        model: the model, whose configuration says the number of tokens and of labels.
        count: the number of canaries.
        longest: the largest number of tokens that a row may have; `None` for any number.
        kept_columns: the columns that reach the collator.

    Raises:
        ValueError: a column cannot be made up, such as one of images.
    """
    length = CANARY_LENGTH if longest is None else min(CANARY_LENGTH, longest)
    try:
        return generate_rows(dataset, model, count=count, length=length, kept_columns=kept_columns)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"canaries={count}: {reason}; leave canaries out.") from None


def describe_canaries(canaries: Rows, coins: Coins) -> dict[str, Any]:
    """Return the public facts of a run's canaries: their number, a fingerprint of them, and the coins' commitment."""
    content = [sorted((name, np.asarray(value).tolist()) for name, value in row.items()) for row in canaries]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"count": len(canaries), "rows": digest, "commitment": coins.commitment}


class RowsWithCanaries(SealedRows):
    """Fetches rows under seal. After those of the data set come the canaries.

    Args:
        dataset: the data set.
        dropped_column: a column to leave out, because it only says to which unit a row belongs.
        canaries: the canaries.
        coins: which of them are in.
    """

    def __init__(self, dataset: Dataset, *, dropped_column: str | None, canaries: Rows, coins: Coins) -> None:
        super().__init__(dataset, dropped_column=dropped_column)
        self._num_rows = len(dataset)
        self._canaries = canaries
        self._coins = coins

    def __len__(self) -> int:
        return self._num_rows + len(self._canaries)

    def _fetch(self, drawn: DrawnRow) -> FetchedRow:
        if drawn.row < self._num_rows:
            return super()._fetch(drawn)
        number = drawn.row - self._num_rows
        row = dict(self._canaries[number]) if self._coins.values[number] else None
        return FetchedRow(unit=drawn.unit, row=row, slot=drawn.slot, key=drawn.key)
