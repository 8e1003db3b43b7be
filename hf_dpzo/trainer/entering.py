"""The durable Trainer, made accountable: each run is in the ledger of its data before its first step.

Only the first process writes there. Replays and evaluations release nothing, and are not entered.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_dpzo.arguments.plan import replan_run
from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.data.units import Units
from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.earlier import enter_earlier_runs
from hf_dpzo.data_ledger.members import Members
from hf_dpzo.data_ledger.notice import announce_ledger, describe_ledger
from hf_dpzo.data_ledger.place import refuse_place
from hf_dpzo.data_ledger.planned_run import PlannedRun
from hf_dpzo.data_ledger.refusal import Wish
from hf_dpzo.data_ledger.run_entry import RunEntry, refuse_lost_ledger
from hf_dpzo.data_ledger.total import Total
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.trainer.resumable import ResumableTrainer


class EnteringTrainer(ResumableTrainer):
    """A durable Trainer that enters its runs, as planned, in the ledger that `args.privacy_ledger` names.

    Subclasses set the units of privacy.

    Guarantee: a run that is not in the ledger takes no step, and neither does one that would pass the ledger's budget.
    """

    # The rows as they were before they became tokens, by which a ledger recognizes them whatever model reads them.
    ledger_rows: Any = None
    _units: Units
    # The entry of the run. Only the first process has one.
    _entry: RunEntry | None = None
    # What cards say of all runs on these data.
    data_ledger_facts: dict[str, Any] | None = None

    def _find_log(self, resume: bool | str) -> None:
        """Find the log, or its place, then enter the run in the ledger of its data."""
        super()._find_log(resume)
        self._entry = self.data_ledger_facts = None
        if self.args.privacy_ledger is None:
            return
        try:
            self.data_ledger_facts = self._processes.run_on_first(self._enter_run)
        except BaseException:
            self._log.close()
            raise

    def _enter_run(self) -> dict[str, Any]:
        folder, path = Path(self.args.output_dir), Path(self.args.privacy_ledger).expanduser()
        if self._log.existing is not None:
            refuse_lost_ledger(path, folder)
        refuse_place(path, output_dir=folder)
        announce_ledger(path, unit_column=self.args.privacy_unit_column)  # A recipe has done so already.
        ledger = DataLedger.for_run(path, folder)
        enter_earlier_runs(ledger, self.args.earlier_runs or ())
        column = self.args.privacy_unit_column
        rows = self.train_dataset if self.ledger_rows is None or column is not None else self.ledger_rows

        def read_units(key: bytes) -> Members:
            return Members.of(rows, unit_column=column, key=key)

        self._entry = RunEntry.enter(ledger, folder, self._describe_wish(), read_units, self._log.existing)
        return self._entry.total.for_card()

    def _describe_wish(self, *, runs: int = 1) -> Wish:
        folder = str(Path(self.args.output_dir).resolve())
        return build_wish(self.args, self.budget, len(self._units), folder=folder, runs=runs)

    def _refuse_beyond_budget(self, *, runs: int = 1) -> None:
        """Raise `BudgetExceededError` if as many new runs like this would pass the budget of their ledger."""
        if self.args.privacy_ledger is not None:
            place, wish = (self.args.privacy_ledger, self.args.output_dir), self._describe_wish(runs=runs)
            self._processes.run_on_first(lambda: DataLedger.for_run(*place).refuse(wish))

    @property
    def _has_ledger(self) -> bool:
        """Whether there is a ledger already, which the first run on these data begins."""
        return self.args.privacy_ledger is not None and Path(self.args.privacy_ledger).expanduser().exists()

    def _describe_ledger(self) -> str | None:
        """Return where the ledger of these data is and what it holds, in a line; `None` without one."""
        if self.args.privacy_ledger is None:
            return None
        return describe_ledger(Path(self.args.privacy_ledger), unit_column=self.args.privacy_unit_column)

    def _preview_ledger(self) -> Total:
        """Return what all runs on these data would come to with this one."""
        column = self.args.privacy_unit_column
        ledger = DataLedger(self.args.privacy_ledger)
        return ledger.preview(self.budget, unit_column=column, num_units=len(self._units))

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> tuple:
        """Prepare as stock does, then note in the ledger that the log is there."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.privacy_ledger is not None:
            self._processes.run_on_first(lambda: self._entry.begin())
        return prepared

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint as stock does, then note in the ledger how far the run has come."""
        super()._save_checkpoint(model, trial)
        if self._entry is not None:
            self._entry.note_progress()

    def _close_log(self) -> None:
        """Close the entry, while no other process can go on with the run, then the log."""
        try:
            if self._entry is not None:
                self._entry = self._entry.close(spent_steps=max(self._log.num_written, self._log.num_spent_steps))
                self.data_ledger_facts = self._entry.total.for_card()
        finally:
            super()._close_log()


def build_wish(args: ZOTrainingArguments, budget: Budget, units: int, *, folder: str = "", runs: int = 1) -> Wish:
    """Return what a ledger is asked for: a run as it is planned, and how to plan it anew if that is refused.

    Args:
        args: the arguments that it was planned from.
        budget: its budget.
        units: the number of units of privacy.
        folder: its `output_dir`, as an absolute path.
        runs: how many such runs.
    """

    def describe(planned: Budget) -> PlannedRun:
        column = args.privacy_unit_column
        return PlannedRun.from_budget(planned, unit_column=column, num_units=units, method=args.method, folder=folder)

    def replan(*, target_epsilon: float | None = None, max_steps: int | None = None) -> PlannedRun:
        return describe(replan_run(args, units, target_epsilon=target_epsilon, max_steps=max_steps))

    return Wish(run=describe(budget), times=runs, target_epsilon=args.target_epsilon, replan=replan)
