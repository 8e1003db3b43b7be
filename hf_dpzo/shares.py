"""Each process draws from its own share of the units, by their numbers: so all must number the same rows alike."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_dpzo.processes import Processes
from hf_dpzo.sampling import Drawn, SealedRows
from hf_dpzo.units import Units


# Rows that are compared: enough to notice another order, or another file.
COMPARED = 256


def refuse_other_rows(processes: Processes, dataset: Dataset, units: Units) -> None:
    """Raise in all processes where they would not draw from the same rows, in the same order.

    A row that has one number here and another there could be drawn twice, which the guarantee does not count. Some rows
    are compared, evenly spread, and which rows are of which unit.

    Raises:
        ValueError: the rows differ.
    """
    if processes.size > 1 and not processes.equal(_digest(dataset, units)):
        raise ValueError(
            f"train_dataset: the {processes.size} processes do not hold the same rows in the same order, and a row "
            "with two numbers could be drawn twice; load the same rows in each, and shuffle them with a fixed seed."
        )


def _digest(dataset: Dataset, units: Units) -> int:
    """63 bits that say which rows there are, and whose."""
    found = hashlib.sha256(str((units.num_rows, len(units), units.max_rows)).encode())
    for rows in units.members or ():
        found.update(np.asarray(rows, dtype=np.int64).tobytes() + b";")
    places = np.unique(np.linspace(0, units.num_rows - 1, COMPARED).astype(np.int64)).tolist()
    for fetched in SealedRows(dataset).__getitems__([Drawn(unit=0, row=place) for place in places]):
        found.update(_described(fetched.row).encode())
    return int.from_bytes(found.digest()[:8], "big") >> 1


def _described(value: Any) -> str:
    """The same for the same content, in any process."""
    if isinstance(value, Mapping):
        return str(sorted((str(name), _described(one)) for name, one in value.items()))
    if isinstance(value, list | tuple):
        return str([_described(one) for one in value])
    if isinstance(value, torch.Tensor | np.ndarray):
        return str((tuple(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()))
    return repr(value) if isinstance(value, str | int | float | bytes | None) else type(value).__name__
