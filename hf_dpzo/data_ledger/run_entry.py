"""One run's entry in a ledger, from before its first step to its end, and over interruptions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Self

from transformers.utils import logging

from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.entries import BEGUN, ENDED, PLANNED, WITHDRAWN, EnteredRun
from hf_dpzo.data_ledger.entry_mark import EntryMark
from hf_dpzo.data_ledger.members import Members
from hf_dpzo.data_ledger.place import DataLedgerError
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.refusal import Wish
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory


logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """The entry of a run in a ledger, in the one process that writes it.

    Args:
        ledger: the ledger.
        name: what the run's folder calls it.
        folder: the run's folder.
        plan: what it plans to release.
        total: what all runs came to when it was entered.
    """

    ledger: DataLedger
    name: str
    folder: Path
    plan: PlannedRun
    total: Total

    @classmethod
    def enter(
        cls,
        ledger: DataLedger,
        folder: Path,
        wish: Wish,
        read_units: Callable[[bytes], Members],
        log: Trajectory | None,
    ) -> Self:
        """Enter a run before its first step, or find its entry if it goes on.

        A run that goes on in its own folder is one entry, also where the folder was moved. A copy of the folder that
        goes on beside it is another one, of those steps that the copy still has to take.

        Args:
            ledger: the ledger.
            folder: the folder of the run.
            wish: the run, as it is planned.
            read_units: returns the units of privacy of its rows, by the key of the ledger.
            log: its log; `None` for a run that begins.

        Raises:
            BudgetExceededError: all runs together would pass the budget of the ledger.
        """
        entries = ledger.read()
        mark = EntryMark.load(folder)
        known = None if mark is None else entries.find(mark.name)
        if known is None or not _is_same_run(known, log, folder, mark):
            if known is not None and log is not None:
                wish = wish.changed(methodcaller("without_steps", len(log.records)))
            mark = EntryMark.new(entries.identity)
        members = read_units(entries.key)
        mark.save(folder)  # Before the entry, so that a kill in between leaves no entry that nobody finds.
        total = ledger.enter(wish, members, name=mark.name)
        return cls(ledger=ledger, name=mark.name, folder=folder, plan=wish.run, total=total)

    def begin(self) -> None:
        """Note that the run's log is there, before its first step; raise `DataLedgerError` if that cannot be noted."""
        self._note(BEGUN)

    def note_progress(self) -> None:
        """Note how far the run has come. It was entered as planned, so nothing is lost if that fails."""
        self._try(lambda: self._note(BEGUN))

    def close(self, *, spent_steps: int) -> Self:
        """Note that the run has ended, and return what all runs come to. Call it while the log is locked.

        Args:
            spent_steps: the number of steps that the run may have released. Without any it is withdrawn.
        """
        if not spent_steps:
            self._try(lambda: self.ledger.note(self.name, state=WITHDRAWN))
            return self
        self._try(lambda: self._note(ENDED))
        return self._try(self._compose_anew) or self

    def _compose_anew(self) -> Self:
        entries = self.ledger.read()
        runs = [run.plan for run in entries.counted]
        delta = self.total.delta if entries.budget is None else entries.budget.delta
        return replace(self, total=Total.of(runs, delta=delta, unit_column=self.plan.unit_column))

    def _note(self, state: str) -> None:
        log = Trajectory.read(self.folder)
        steps = len(log.records)
        checksum = log.checksum_after(steps).hex()
        name = log.header["base"]["name"]
        self.ledger.note(self.name, state=state, steps=steps, checksum=checksum, base_model=name)

    def _try(self, work: Callable[[], Self | None]) -> Self | None:
        """Return the result of `work`; warn where the ledger, or the log, is not there any more."""
        try:
            return work()
        except (DataLedgerError, TrajectoryError, OSError) as error:
            logger.warning(
                f"{error} This run was entered as planned, before its first step, so nothing of it is missing."
            )
            return None


def refuse_lost_ledger(path: Path, folder: Path) -> None:
    """Raise `DataLedgerError` if the run in `folder`, which goes on, was entered in a ledger, and none is at `path`."""
    if not path.exists() and EntryMark.load(folder) is not None:
        raise DataLedgerError(
            f"privacy_ledger={path}: there is no such ledger, and this run was entered in one; put it back, or name "
            "where it is now."
        )


def _is_same_run(known: EnteredRun, log: Trajectory | None, folder: Path, mark: EntryMark) -> bool:
    """Return whether the run in `folder` is the one that the entry `known` counts.

    Args:
        known: the entry that the folder names.
        log: the log in the folder; `None` if there is none.
        folder: the folder.
        mark: the mark in the folder.
    """
    elsewhere = Path(known.plan.folder)
    if elsewhere != folder.resolve() and EntryMark.load(elsewhere) == mark:
        return False  # A copy: the run may go on in both.
    if log is None:  # What was released before is counted, if anything was, and its log was deleted since.
        return known.state == WITHDRAWN or (known.state == PLANNED and known.checksum is None)
    if known.checksum is None:
        return True
    # If not, it is a copy from before the steps that are known.
    return known.steps <= len(log.records) and log.checksum_after(known.steps).hex() == known.checksum
