"""Tiny data."""

import functools
import random

from datasets import Dataset


@functools.cache
def labelled_rows(count: int, seed: int = 0) -> Dataset:
    """Rows whose class is the half of the vocabulary that their first token comes from."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(4, 48) for _ in range(draw.randrange(3, 10))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(ids[0] >= 26)})
    return Dataset.from_list(rows)


def few_public_rows() -> list[dict]:
    """The fewest rows for the isolation probe, in tests whose subject it is not. By default it makes up more."""
    return labelled_rows(2, seed=9).to_list()
