"""The Trainer, made durable: what is released is on disk before anything moves, and a run goes on where it was killed.

A checkpoint holds weights and the Trainer's own state. Optimizer, schedule, stages and ledger follow from the log.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dpzo.distributed.processes import Processes
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.methods.method import Method, Stage
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.models.unwrap import is_prompt_tuned, unwrap_model, unwrap_optimizer
from hf_dpzo.step.descent import Descent
from hf_dpzo.trainer.checks import mark_as_trained
from hf_dpzo.trainer.redacting import RedactingTrainer
from hf_dpzo.trajectory.replay import select_trained_parameters
from hf_dpzo.trajectory.run import build_header, is_stateful
from hf_dpzo.trajectory.run_log import RunLog


class ResumableTrainer(RedactingTrainer):
    """A discreet Trainer that keeps a log, and resumes from it.

    Subclasses set the `method`, its budget, the processes, public facts about the rows, and what the run is made with.
    """

    method: Method | None
    _processes: Processes
    _row_facts: dict[str, Any]
    _environment: dict[str, Any]
    _log: RunLog | None = None
    # The fingerprint of the weights, while a checkpoint of them is saved.
    _at_checkpoint: str | None = None

    def _begin_stage(self) -> Stage:
        """Begin the stage of the next step."""
        return self._build_descent().begin(len(self.budget.ledger))

    def _build_descent(self) -> Descent:
        """What moves the parameters. Made anew, since wrappers exchange models and optimizers."""
        return Descent(
            model=self.model,
            optimizer=unwrap_optimizer(self.optimizer),
            method=self.method,
            planned_steps=self.budget.planned_steps,
        )

    def _get_learning_rate(self) -> float:
        """As stock, times the share of it that the method's present stage takes."""
        return super()._get_learning_rate() * unwrap_optimizer(self.optimizer).rate_factor

    def _find_log(self, resume: bool | str) -> None:
        """Find the log to go on with, or see that there is none; what it holds is spent."""
        planned = self.budget.planned_steps
        if resume:
            self.budget = self.budget.copy_unspent()
        self.budget.require_steps(planned)
        folder = Path(self.args.output_dir)
        self._log = RunLog(folder, resume=resume, planned_steps=planned, processes=self._processes)
        self.budget.ledger.append(self.budget.query, count=self._log.num_spent_steps)

    def _record_release(self, descent: Descent, step: int, integers: tuple[int, ...]) -> None:
        """Spend a step, and put on disk what it releases."""
        self.budget.spend()
        self._log.append(descent, step, integers)

    def _close_log(self) -> None:
        """Take no more steps, unless none could be taken yet. One that is in the log and was not applied is."""
        if self._log.was_opened:
            self.budget.close()
            self._build_descent().optimizer.finish()
        self._log.close()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """As stock, at the last step of the log, not of the checkpoint."""
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.global_step = self._log.num_spent_steps
        self.state.epoch = self._log.num_spent_steps / num_update_steps_per_epoch
        return divmod(self._log.num_spent_steps, num_update_steps_per_epoch)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> tuple:
        """As stock; then begin the log, or catch up with it."""
        self.optimizer = self.lr_scheduler = None  # Those of an attempt before have moved on.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        descent, initial = self._build_descent(), self._starts_from_initial
        self._log.restore_start(self.model, from_initial=initial)
        # Of what is split, processes that hold the same part compare it at the first step.
        self._processes.broadcast_tensors_(one for one in descent.optimizer.parameters() if not is_sharded([one]))
        header = build_header(
            model=self.model,
            optimizer=descent.optimizer,
            method=self.method,
            update=self.args.update_rule,
            budget=self.budget,
            rows=self._row_facts,
            initial=fingerprint_values(descent.optimizer.parameters()) if initial else None,
            environment=self._environment,
        )
        self._log.open(header, self.model)
        mark_as_trained(unwrap_model(self.model))
        if self._log.existing is not None:
            self._log.catch_up(descent, self.lr_scheduler, from_initial=initial)
        return prepared

    @property
    def _starts_from_initial(self) -> bool:
        """Whether a run starts from the initial values: a new one does, and one whose steps depend on all before."""
        # Of prompt tuning a checkpoint holds the virtual tokens alone, and not the encoder that made them.
        # And a checkpoint of a model that is split would have to be taken apart again.
        incomplete = is_prompt_tuned(self.model) or is_sharded(self.model.parameters())
        incomplete = incomplete or is_stateful(self.method, self.args.update_rule)
        return self._log.checkpoint is None or incomplete

    def _run_epoch(self, *, resume_from_checkpoint: Any, **rest: Any) -> None:
        """As stock, but for the epochs of a run that is complete. A resumed epoch is cut short at its front."""
        if self.state.global_step < self.state.max_steps:
            resumed = resume_from_checkpoint or self._log.existing
            super()._run_epoch(resume_from_checkpoint=resumed, **rest)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As stock, unless everything will be replayed."""
        select_trained_parameters(self._log.existing, self.model)
        if not self._starts_from_initial:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As stock; then mark it as whole.

        The weights are hashed once, before anything is saved: should other ones be saved, the mark does not fit them.
        """
        weights = fingerprint_values(self._build_descent().optimizer.parameters())  # In all processes.
        self._at_checkpoint = weights
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._at_checkpoint = None
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            self._log.mark_checkpoint(folder, weights=weights, steps=self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Nothing: the log gives back what they hold."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Nothing: they catch up with the log."""
