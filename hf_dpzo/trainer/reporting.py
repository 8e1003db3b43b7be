"""The noisy count of failing rows that a run may release at its end."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_dpzo.arguments.report_plan import build_report_mechanism
from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.io.files import read_plain, write_atomically
from hf_dpzo.io.strict_json import parse_json
from hf_dpzo.privacy.queries import LaplaceQuery, Query


# Beside the log of the run. It is not uploaded.
REPORT_FILE = "failed_rows.json"


@dataclass(frozen=True, kw_only=True)
class FailedRows:
    """What a run released about the units of privacy, rows or users, on which training fails.

    Args:
        share: the estimated share of all units, which noise may move below 0.
        deviation: about how far it is off: the standard deviation that the batch and the noise give it.

    >>> str(FailedRows(share=0.013, deviation=0.004))
    '1.3 % (give or take 0.8 %)'
    """

    share: float
    deviation: float

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % (give or take {200 * self.deviation:.1f} %)"

    def save(self, folder: Path) -> None:
        """Write it to `folder`, where a run that is resumed finds it."""
        write_atomically(folder / REPORT_FILE, json.dumps(asdict(self)).encode())


def load_report(folder: Path) -> FailedRows | None:
    """Return what the run in `folder` has released; `None` if the file is not there any more, or was damaged."""
    try:
        return FailedRows(**parse_json(read_plain(folder / REPORT_FILE).decode()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def mark_failed_units(losses: torch.Tensor, batch: LogicalBatch) -> torch.Tensor:
    """Return 1 for each drawn unit of which no row has a finite loss, and 0 for others. SENSITIVE.

    The result is float64 `[units, 1]`.

    Args:
        losses: one loss for each evaluated row, `[rows]`. Rows that could not be fetched or are too long have none.
        batch: the batch, one that was drawn for this count alone.
    """
    failed = torch.ones((batch.num_units, 1), dtype=torch.float64)
    units = torch.tensor(batch.row_units, dtype=torch.int64)
    failed[units[torch.isfinite(losses.detach().cpu().flatten())]] = 0.0
    return failed


def release_report(failed: torch.Tensor, query: Query, *, expected_batch_size: int, processes: Processes) -> FailedRows:
    """Release the share of failing units, by the one door.

    Args:
        failed: what `mark_failed_units` returned for this process' share of a Poisson batch. SENSITIVE.
        query: the planned release.
        expected_batch_size: the expected number of units in the batch.
        processes: the run's processes.

    Guarantee: one release of `query`, which the budget has planned.
    """
    mechanism = build_report_mechanism(type(query), query.noise_multiplier, expected_batch_size)
    (share,) = mechanism.release(failed, processes).coefficients
    scale = math.sqrt(2) if isinstance(query, LaplaceQuery) else 1.0
    noise = scale * mechanism.noise_scale * mechanism.unit
    sampling = max(share, 1 / expected_batch_size) / expected_batch_size  # The variance of a Poisson count.
    return FailedRows(share=share, deviation=math.sqrt(noise**2 + sampling))
