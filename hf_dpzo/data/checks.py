"""Training data that can not be sampled, or that would be read as something else, are refused before a row is read.

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
        private: whether each row, or user, is protected.
        unit_column: the column that says whose a row is.
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
    """Raise `ValueError` where what is `read` in training is not what the budget was `planned` for.

    Args:
        planned: the training data.
        read: the same, without the columns that the model does not take.
        num_rows: as many as were planned for.
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
    """Return `probe_rows` as a list, or raise `ValueError` where they are no rows."""
    if probe_rows is None:
        return None
    rows = list(probe_rows) if isinstance(probe_rows, Iterable) else []
    if len(rows) < 2 or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("probe_rows: it must be two or more public rows, each from the names of columns to values.")
    return rows


def _has_repeated_rows(dataset: Any) -> bool:
    """Whether a data set of `datasets` picks a row more than once. Rows that are equal on disk are not looked for."""
    picked = getattr(dataset, "_indices", None)  # A table of one column; None where all rows are in order.
    return picked is not None and len(picked.column(0).unique()) < picked.num_rows


# Rows that are fetched at once.
_BLOCK = 1000


def refuse_differing_rows(processes: Processes, dataset: Dataset, units: Units) -> None:
    """Raise in all processes where they would not draw from the same rows, in the same order.

    A row that has one number here and another there could be drawn twice, which the guarantee does not count. So all
    rows are read once, unless `datasets` knows them by one fingerprint, and compared, with whose they are.

    Raises:
        ValueError: the rows differ.
    """
    if processes.size == 1 or processes.all_equal(_fingerprint(dataset, units)):
        return
    if not processes.all_equal(_fingerprint_rows(dataset, units)):
        raise ValueError(
            f"train_dataset: the {processes.size} processes do not hold the same rows in the same order, and a row "
            "with two numbers could be drawn twice; load the same rows in each, and shuffle them with a fixed seed."
        )


def _fingerprint(dataset: Dataset, units: Units) -> int:
    """63 bits that are equal only for the same rows; but they may differ for them too."""
    known = isinstance(dataset, datasets.Dataset)
    return _finish_fingerprint(hashlib.sha256((dataset._fingerprint if known else secrets.token_hex()).encode()), units)


def _fingerprint_rows(dataset: Dataset, units: Units) -> int:
    """63 bits that say which rows there are, and whose."""
    rows, found = SealedRows(dataset), hashlib.sha256()
    for first in range(0, units.num_rows, _BLOCK):
        block = range(first, min(first + _BLOCK, units.num_rows))
        for fetched in rows.__getitems__([DrawnRow(unit=0, row=row, slot=0) for row in block]):
            found.update(_describe_value(fetched.row).encode() + b";")
    return _finish_fingerprint(found, units)


def _finish_fingerprint(found: Any, units: Units) -> int:
    found.update(str((units.num_rows, len(units), units.max_rows_per_unit)).encode())
    for rows in units.members or ():
        found.update(np.asarray(rows, dtype=np.int64).tobytes() + b";")
    return int.from_bytes(found.digest()[:8], "big") >> 1


def _describe_value(value: Any) -> str:
    """The same for the same content, in any process."""
    if isinstance(value, Mapping):
        return str(sorted((str(name), _describe_value(one)) for name, one in value.items()))
    if isinstance(value, list | tuple):
        return str([_describe_value(one) for one in value])
    if isinstance(value, torch.Tensor | np.ndarray):
        return str((str(value.dtype), value.tolist()))
    return repr(value) if isinstance(value, str | int | float | bytes | None) else type(value).__name__
