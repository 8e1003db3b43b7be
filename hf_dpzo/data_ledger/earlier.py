"""Runs that were made without the ledger of their data: entered afterwards, by their logs."""

from collections.abc import Iterable
from pathlib import Path

from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.entries import ENDED, EnteredRun
from hf_dpzo.data_ledger.entry_mark import EntryMark
from hf_dpzo.data_ledger.members import Members
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.refusal import Wish
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.run import LoggedRun


def enter_earlier_runs(ledger: DataLedger, folders: Iterable[str | Path]) -> None:
    """Enter the runs in `folders` that the ledger does not hold, whatever its budget: what they released is out.

    Such a run counts with all that its log claims: its unused steps, its trials, and the runs before it.

    Raises:
        TrajectoryError: there is no log in a folder, or none of a run.
    """
    for folder in map(Path, folders):
        log, mark = Trajectory.read(folder), EntryMark.load(folder)
        known = None if mark is None else ledger.read().find(mark.name)
        if known is not None and known.counts and _holds(known, log, folder):
            continue
        run = LoggedRun.from_log(log)
        plan = PlannedRun(
            releases=run.budget.claimed_releases,
            delta=run.budget.delta,
            unit_column=run.unit_column,
            num_units=run.num_units,
            method=run.method_name,
            folder=str(folder.resolve()),
            base_model=run.header["base"]["name"],
        )
        checksum = log.checksum_after(len(log.records)).hex()
        nobody = Members(form=b"", digests=None)  # Whose rows they were is not known, so they are everybody's.
        ledger.enter(Wish(run=plan), nobody, name=f"log {checksum}", is_released=True)
        ledger.note(f"log {checksum}", state=ENDED, steps=len(log.records), checksum=checksum)


def _holds(known: EnteredRun, log: Trajectory, folder: Path) -> bool:
    """Return whether the entry counts all that `log` holds: of its own run, or of a copy that did not go on."""
    is_own = known.plan.folder == str(folder.resolve())
    return is_own or log.checksum_after(len(log.records)).hex() == known.checksum
