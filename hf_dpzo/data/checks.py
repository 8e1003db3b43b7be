"""Checks of the training data: those that cannot be sampled, or that training would read differently, are refused.

Every message is one sentence: the value, the reason, the remedy.
"""

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from hf_dpzo.data.sampling import DrawnRow, SealedRows
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import Processes


def refuse_rows(dataset: Any, *, private: bool, unit_column: str | None) -> None:
    """Raise `ValueError` for training data without a length and numbered rows, or with one row under several numbers.

    Args:
        dataset: the training data.
        private: whether the method is private, so that a repeated row matters.
        unit_column: the column that says to which unit of privacy a row belongs; `None` if each row is a unit.
    """
    name = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"train_dataset={name}: it maps names to data sets, and is none itself; pass one of them, such as "
            'train_dataset["train"].'
        )
    if isinstance(dataset, torch.utils.data.IterableDataset) or not isinstance(dataset, Sized):
        raise ValueError(
            f"train_dataset={name}: an iterable has no length to sample from; pass "
            "datasets.Dataset.from_generator(lambda: rows), which writes its rows to disk and maps them into memory."
        )
    if private and unit_column is None and _has_repeated_rows(dataset):
        raise ValueError(
            f"train_dataset={name}: it holds a row more than once, as interleave_datasets may, and each copy would be "
            "protected by itself; number the rows before that, and name the numbers' column in privacy_unit_column."
        )


def refuse_changed_rows(planned: Any, read: Any, num_rows: int) -> None:
    """Raise `ValueError` if the data that training reads are not those that the budget was planned for.

    Args:
        planned: the training data that the trainer was given.
        read: the same data, without the columns that the model does not take.
        num_rows: the number of rows that the budget was planned for.
    """
    if len(read) != num_rows:
        raise ValueError("train_dataset: it is not the one that the budget was planned for; make a new trainer.")
    form = getattr(planned, "format", None)
    if isinstance(form, Mapping) and form.get("type") == "custom":
        dropped = sorted({*planned.column_names} - {*read.column_names})
        if dropped:
            raise ValueError(
                f"train_dataset: its transform would be given rows without {', '.join(dropped)}, which the model does "
                "not take; set remove_unused_columns=False."
            )


def check_probe_rows(probe_rows: Any) -> list[Mapping[str, Any]] | None:
    """Return `probe_rows` as a list, or raise `ValueError` unless they are two or more rows."""
    if probe_rows is None:
        return None
    rows = list(probe_rows) if isinstance(probe_rows, Iterable) else []
    if len(rows) < 2 or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("probe_rows: it must be two or more public rows, each from the names of columns to values.")
    return rows


def _has_repeated_rows(dataset: Any) -> bool:
    """Return whether a data set of `datasets` selects a row twice. Equal rows on disk are not searched for."""
    picked = getattr(dataset, "_indices", None)  # A table of one column; None if all rows are there in order.
    return picked is not None and len(picked.column(0).unique()) < picked.num_rows


# The number of rows that are fetched at once.
_BLOCK = 1000


def refuse_differing_rows(processes: Processes, dataset: Dataset, units: Units) -> None:
    """Raise in all processes unless all hold the same rows, in the same order and with the same units.

    A row that has different numbers in two processes could be drawn twice, which the guarantee does not count. The
    fingerprints of `datasets` are compared first. Only if they differ, or there are none, all rows are read once.

    Raises:
        ValueError: the rows or their units differ between processes.
    """
    if processes.size == 1 or processes.all_equal(_fingerprint(dataset, units)):
        return
    if not processes.all_equal(_fingerprint_content(dataset, units)):
        raise ValueError(
            f"train_dataset: the {processes.size} processes do not hold the same rows in the same order, and a row "
            "with two numbers could be drawn twice; load the same rows in each, and shuffle them with a fixed seed."
        )


def _fingerprint(dataset: Dataset, units: Units) -> int:
    """Return 63 bits that differ for different rows, but may differ for the same rows too."""
    text = dataset._fingerprint if isinstance(dataset, datasets.Dataset) else secrets.token_hex()
    return _finish_fingerprint(hashlib.sha256(text.encode()), units)


def _fingerprint_content(dataset: Dataset, units: Units) -> int:
    """Return 63 bits that identify the rows' content and their units."""
    rows = SealedRows(dataset)
    digest = hashlib.sha256()
    for first in range(0, units.num_rows, _BLOCK):
        block = range(first, min(first + _BLOCK, units.num_rows))
        for fetched in rows.__getitems__([DrawnRow(unit=0, row=row, slot=0) for row in block]):
            digest.update(_describe_value(fetched.row).encode() + b";")
    return _finish_fingerprint(digest, units)


def _finish_fingerprint(digest: Any, units: Units) -> int:
    digest.update(str((units.num_rows, len(units), units.max_rows_per_unit)).encode())
    for rows in units.members or ():
        digest.update(np.asarray(rows, dtype=np.int64).tobytes() + b";")
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def _describe_value(value: Any) -> str:
    """Return a text that is the same for the same content, in any process."""
    if isinstance(value, Mapping):
        return str(sorted((str(name), _describe_value(item)) for name, item in value.items()))
    if isinstance(value, list | tuple):
        return str([_describe_value(item) for item in value])
    if isinstance(value, torch.Tensor | np.ndarray):
        return str((str(value.dtype), value.tolist()))
    return repr(value) if isinstance(value, str | int | float | bytes | None) else type(value).__name__
