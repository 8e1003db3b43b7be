"""Ledgers of made-up runs."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.members import Members
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.refusal import Wish
from hf_dpzo.privacy.queries import GaussianQuery, NonPrivateQuery, Query


QUERY = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01)
NO_NOISE = NonPrivateQuery()


def plan(
    *, steps: int = 100, query: Query = QUERY, unit_column: str | None = None, folder: str = "/models/a"
) -> PlannedRun:
    return PlannedRun(
        releases=((query, steps),),
        delta=None if query is NO_NOISE else 1e-5,
        unit_column=unit_column,
        num_units=900,
        method="mezo" if query is NO_NOISE else "dpzero",
        folder=folder,
    )


def units(*digests: int, form: bytes = b"rows") -> Members:
    return Members(form=form, digests=np.array(sorted(digests), dtype="<u8"))


def enter(ledger: DataLedger, name: str, members: Members | None = None, **changes: object) -> None:
    ledger.enter(Wish(run=plan(**changes)), members or units(1, 2, 3), name=name)


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own; return its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def names_in(path: Path) -> list[str]:
    return [run.name for run in DataLedger(path).read().runs]
