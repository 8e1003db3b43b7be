"""Poisson batches: each row joins each batch independently and secretly.

The number of rows in a batch is itself secret. Nothing here counts, logs or keeps it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from hf_dpzo.noise import BernoulliMask
from hf_dpzo.sealed import sealed


class PoissonBatchSampler(Sampler[list[int]]):
    """Yields lists of row numbers, some of them empty. Two passes never agree: there is no seed.

    Args:
        size: number of rows.
        sampling_rate: the probability with which each row joins a batch.

    >>> sampler = PoissonBatchSampler(size=4, sampling_rate=0.5)
    >>> len(sampler), len(list(sampler))
    (2, 2)
    """

    def __init__(self, *, size: int, sampling_rate: float) -> None:
        self._mask = BernoulliMask(size=size, rate=sampling_rate)

    def __len__(self) -> int:
        """Batches per epoch: as many as use each row once on average."""
        return steps_per_epoch(self._mask.rate)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            yield np.flatnonzero(self._mask.draw()).tolist()


def steps_per_epoch(sampling_rate: float) -> int:
    """How many Poisson batches use each row once on average.

    >>> steps_per_epoch(0.016)
    62
    """
    return max(1, round(1 / sampling_rate))


class SealedRows(Dataset):
    """The rows of a data set, fetched under seal."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The rows at `indices`: what a dataloader asks for a batch with."""
        return sealed("train_dataset", lambda: [self._dataset[index] for index in indices])


class LogicalBatchCollator:
    """Makes one dataloader item of one logical batch: a list of physical micro-batches.

    Rows are put in order of length first, which cuts padding. The order makes no difference to the sum.

    Args:
        collate: makes a micro-batch of a list of rows.
        micro_batch_size: rows in a micro-batch, at most.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], *, micro_batch_size: int) -> None:
        self.collate, self.micro_batch_size = collate, micro_batch_size

    def __call__(self, rows: Sequence[Any]) -> dict[str, list[Any]]:
        """Return `{"micro_batches": [...]}`; the list is empty for an empty batch.

        A micro-batch is `{"rows": how many, "inputs": what collate made of them}`: a loss is owed for each row that was
        drawn, whatever the collator made of it.
        """
        ordered = sorted(rows, key=_length)
        starts = range(0, len(ordered), self.micro_batch_size)
        return {"micro_batches": [self._micro_batch(ordered[i : i + self.micro_batch_size]) for i in starts]}

    def _micro_batch(self, rows: list[Any]) -> dict[str, Any]:
        return {"rows": len(rows), "inputs": sealed("data_collator", lambda: self.collate(rows))}


def _length(row: Any) -> int:
    return len(row["input_ids"]) if isinstance(row, dict) and "input_ids" in row else 0
