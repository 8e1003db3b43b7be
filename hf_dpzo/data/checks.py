"""Checks of the training data: those that cannot be sampled, or that training would read differently, are refused.

Every message is one sentence: the value, the reason, the remedy.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_dpzo.data.content import UnknownContentError, digest_rows, digest_tables
from hf_dpzo.data.origins import has_repeated_rows
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
    if private and unit_column is None and has_repeated_rows(dataset):
        raise ValueError(
            f"train_dataset={name}: it holds a row more than once, as interleave_datasets may, and each copy would be "
            "protected by itself; number the rows before that, and name the numbers' column in privacy_unit_column."
        )


def refuse_changed_rows(planned: Any, read: Any, *, planned_units: Units, read_units: Units) -> None:
    """Raise `ValueError` if the data that training reads are not those that the budget was planned for.

    Args:
        planned: the training data that the trainer was given.
        read: the data that training is about to read, without the columns that the model does not take.
        planned_units: the units of privacy that the budget was planned for.
        read_units: the units of the data that are about to be read, from these data themselves.
    """
    if not planned_units.has_same_members(read_units):
        raise ValueError(
            "train_dataset: it is not the one that the budget was planned for, by its length or by which rows belong "
            "together; make a new trainer."
        )
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


def refuse_differing_rows(processes: Processes, dataset: Dataset, units: Units) -> None:
    """Raise in all processes unless all hold the same rows, in the same order and with the same units.

    A row that has different numbers in two processes could be drawn twice, which the guarantee does not count. Contents
    are compared, never a name or a fingerprint that a data set was given: tables of `datasets` as they are on disk, and
    where these differ, or there are none, every row is read once.

    Raises:
        ValueError: the rows or their units differ between processes, or cannot be compared.
    """
    if processes.size == 1 or processes.all_equal(_join(digest_tables(dataset), units)):
        return
    try:
        rows, unknown = digest_rows(dataset), None
    except UnknownContentError as error:
        rows, unknown = b"", error
    if processes.all_reduce_max(float(unknown is not None)):
        raise unknown or UnknownContentError("train_dataset: another process can not compare its rows; see there.")
    if not processes.all_equal(_join(rows, units)):
        raise ValueError(
            f"train_dataset: the {processes.size} processes do not hold the same rows in the same order, and a row "
            "with two numbers could be drawn twice; load the same rows in each, and shuffle them with a fixed seed."
        )


def _join(rows: bytes, units: Units) -> int:
    """Return 63 bits that follow from the digest of the rows and from the units."""
    digest = hashlib.sha256(rows)
    digest.update(str((units.num_rows, len(units), units.max_rows_per_unit)).encode())
    for members in units.members or ():
        digest.update(np.asarray(members, dtype=np.int64).tobytes() + b";")
    return int.from_bytes(digest.digest()[:8], "big") >> 1
