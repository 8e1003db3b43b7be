"""Each process draws from its own share of the units, by their numbers: so all must number the same rows alike."""

import hashlib
import secrets
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_dpzo.processes import Processes
from hf_dpzo.sampling import Drawn, SealedRows
from hf_dpzo.units import Units


# What steers the loop.
SETTINGS = (
    "parallel",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "logging_strategy",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "audit",
    "load_best_model_at_end",
    "push_to_hub",
)
# Rows that are fetched at once.
_BLOCK = 1000


def refuse_other_rows(processes: Processes, dataset: Dataset, units: Units) -> None:
    """Raise in all processes where they would not draw from the same rows, in the same order.

    A row that has one number here and another there could be drawn twice, which the guarantee does not count. So all
    rows are read once, unless `datasets` knows them by one fingerprint, and compared, with whose they are.

    Raises:
        ValueError: the rows differ.
    """
    if processes.size == 1 or processes.equal(_fingerprint(dataset, units)):
        return
    if not processes.equal(_digest(dataset, units)):
        raise ValueError(
            f"train_dataset: the {processes.size} processes do not hold the same rows in the same order, and a row "
            "with two numbers could be drawn twice; load the same rows in each, and shuffle them with a fixed seed."
        )


def refuse_other_settings(processes: Processes, args: TrainingArguments) -> None:
    """Raise in all processes where their arguments differ that say when something happens, and to what.

    One that evaluates or saves while another one takes a step would wait for ever.

    Raises:
        ValueError: they differ.
    """
    said = {name: str(getattr(args, name)) for name in SETTINGS}
    number = int.from_bytes(hashlib.sha256(str(said).encode()).digest()[:8], "big") >> 1
    if not processes.equal(number):
        raise ValueError(
            f"args: the {processes.size} processes do not have the same {', '.join(SETTINGS[:3])} or other settings of "
            "the loop; launch all with the same arguments."
        )


def _fingerprint(dataset: Dataset, units: Units) -> int:
    """63 bits that are equal only for the same rows; but they may differ for them too."""
    known = isinstance(dataset, datasets.Dataset)
    return _number(hashlib.sha256((dataset._fingerprint if known else secrets.token_hex()).encode()), units)


def _digest(dataset: Dataset, units: Units) -> int:
    """63 bits that say which rows there are, and whose."""
    rows, found = SealedRows(dataset), hashlib.sha256()
    for first in range(0, units.num_rows, _BLOCK):
        block = range(first, min(first + _BLOCK, units.num_rows))
        for fetched in rows.__getitems__([Drawn(unit=0, row=row, place=0) for row in block]):
            found.update(_described(fetched.row).encode() + b";")
    return _number(found, units)


def _number(found: Any, units: Units) -> int:
    found.update(str((units.num_rows, len(units), units.max_rows)).encode())
    for rows in units.members or ():
        found.update(np.asarray(rows, dtype=np.int64).tobytes() + b";")
    return int.from_bytes(found.digest()[:8], "big") >> 1


def _described(value: Any) -> str:
    """The same for the same content, in any process."""
    if isinstance(value, Mapping):
        return str(sorted((str(name), _described(one)) for name, one in value.items()))
    if isinstance(value, list | tuple):
        return str([_described(one) for one in value])
    if isinstance(value, torch.Tensor | np.ndarray):
        return str((str(value.dtype), value.tolist()))
    return repr(value) if isinstance(value, str | int | float | bytes | None) else type(value).__name__
