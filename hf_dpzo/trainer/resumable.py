"""The discreet Trainer, made durable: releases are on disk before anything moves, and a killed run can be resumed.

A checkpoint holds weights and the Trainer's own state. Optimizer, schedule, stages and ledger follow from the log.
"""

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dpzo.distributed.processes import Processes
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.losses.calibration import Calibration
from hf_dpzo.methods.method import Method, Stage
from hf_dpzo.models.adapters import list_adapters, refuse_refrozen_parameters, refuse_switched_adapter
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.models.history import TrainedValues, is_marked_as_trained, mark_as_trained
from hf_dpzo.models.registries import PlainState
from hf_dpzo.models.seal import BrokenSealError, Seal
from hf_dpzo.models.seeded import forget_changed_seed
from hf_dpzo.models.state import ModelState
from hf_dpzo.models.unwrap import is_prompt_tuned, unwrap_optimizer
from hf_dpzo.step.descent import Descent
from hf_dpzo.trainer.beginning import find_beginning, refuse_runs_without_a_claim
from hf_dpzo.trainer.redacting import RedactingTrainer
from hf_dpzo.trainer.scales import match_scales
from hf_dpzo.trajectory.earlier_runs import EarlierRuns, name_log, read_earlier_runs
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.replay import select_trained_parameters
from hf_dpzo.trajectory.run import build_header, is_stateful
from hf_dpzo.trajectory.run_log import RunLog
from hf_dpzo.zo.optimizer import ZOOptimizer


class ResumableTrainer(RedactingTrainer):
    """A discreet Trainer that keeps a log, and resumes from it.

    Subclasses set the `method`, its budget, the processes, public facts about the rows, and the run's environment.
    """

    method: Method | None
    _processes: Processes
    _row_facts: dict[str, Any]
    _environment: dict[str, Any]
    _log: RunLog | None = None
    # The runs on the same rows that the epsilon of this one covers, as they were when training began.
    _earlier_runs: EarlierRuns
    # The names of the adapters when training began, that of the trained one first.
    _adapters: tuple[str, ...] = ()
    # The values that the run leads to.
    _values: TrainedValues | None = None
    # What the model needs to be used, if a recipe made the run.
    used_recipe: Mapping[str, Any] | None = None
    # What the model held when the run began, and the seal on what is trained.
    _state: ModelState
    _seal: Seal
    # The configurations of the model when training began.
    _plain: list[PlainState]
    # The fingerprint of the weights while a checkpoint of them is being saved, and `None` otherwise.
    _at_checkpoint: str | None = None

    def _begin_stage(self) -> Stage:
        """Begin the stage of the next step."""
        return self._build_descent().begin(len(self.budget.ledger))

    def _build_descent(self) -> Descent:
        """Build what moves the parameters. Every call builds it, because wrappers exchange models and optimizers."""
        return Descent(
            model=self.model,
            optimizer=unwrap_optimizer(self.optimizer),
            method=self.method,
            planned_steps=self.budget.planned_steps,
        )

    def _get_learning_rate(self) -> float:
        """Return stock's learning rate times the factor of the method's present stage."""
        return super()._get_learning_rate() * unwrap_optimizer(self.optimizer).rate_factor

    def _find_log(self, resume: bool | str) -> None:
        """Find the log to resume, or check that there is none, and count the steps that it holds as spent."""
        planned = self.budget.planned_steps
        if resume:
            self.budget = self.budget.copy_unspent()
        self.budget.require_steps(planned)
        self._earlier_runs = self._read_earlier_runs()
        folder = Path(self.args.output_dir)
        self._log = RunLog(folder, resume=resume, planned_steps=planned, processes=self._processes)
        self.budget.ledger.append(self.budget.query, count=self._log.num_spent_steps)

    def _refuse_changed_training(self, model: torch.nn.Module) -> None:
        """Raise `ValueError` if what computes, or what is trained, is no longer what it was when training began.

        Args:
            model: the model that evaluates, in the wrappers of accelerate.
        """
        if self.accelerator.unwrap_model(model, keep_torch_compile=False) is not self.model:
            raise ValueError(
                "model: another one evaluates than is trained, because trainer.model was exchanged; make a new trainer."
            )
        self._refuse_switched_adapter()
        refuse_refrozen_parameters(self.model, unwrap_optimizer(self.optimizer).parameters())

    def _refuse_switched_adapter(self) -> None:
        """Raise `ValueError` if another adapter than the trained one computes. A search keeps no model."""
        if self.model is not None:
            refuse_switched_adapter(self.model, self._adapters, unwrap_optimizer(self.optimizer).parameters())

    def _record_release(self, descent: Descent, step: int, integers: tuple[int, ...]) -> None:
        """Spend a step, and write its release to disk."""
        self.budget.spend()
        self._log.append(descent, step, integers)

    def _record_values(self) -> None:
        """Remember the present values, from which another run of this process must not begin without counting this."""
        if self._values is None:
            return
        try:
            name = name_log(Trajectory.read(Path(self.args.output_dir)))
        except (OSError, TrajectoryError):
            name = ""  # A run whose log is not there any more cannot be counted by another one.
        self._values.record(name)

    def _close_log(self) -> None:
        """Close the log. If it was opened, also close the budget, and apply a step that is logged but not applied."""
        try:
            if self._log.was_opened:
                self.budget.close()
                self._build_descent().optimizer.finish()
                self._record_values()
        finally:
            self._log.close()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Start as stock does, but at the last step of the log, not of the checkpoint."""
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.global_step = self._log.num_spent_steps
        self.state.epoch = self._log.num_spent_steps / num_update_steps_per_epoch
        return divmod(self._log.num_spent_steps, num_update_steps_per_epoch)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> tuple:
        """Prepare as stock does, then begin the log, or catch up with it."""
        self.optimizer = self.lr_scheduler = None  # Those of an earlier attempt have already taken steps.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        descent = self._build_descent()
        if self.args.perturbation_scales:
            scales = match_scales(self.model, descent.optimizer, self.args.perturbation_scales)
            descent.optimizer.scale_directions(scales)
        initial = self._starts_from_initial
        self._log.restore_start(self.model, from_initial=initial)
        # Sharded ones are not broadcast: processes that hold the same shard compare it at the first step.
        whole = (parameter for parameter in descent.optimizer.parameters() if not is_sharded([parameter]))
        self._processes.broadcast_tensors_(whole)
        if self._log.checkpoint is None:
            self._forget_changed_seed()
        self._state = ModelState(self.model, moving=descent.optimizer.parameters())
        self._inspect(prepared[0])
        values = fingerprint_values(descent.optimizer.parameters()) if initial else None
        loss = self.per_example_loss
        header = build_header(
            model=self.model,
            optimizer=descent.optimizer,
            method=self.method,
            update=self.args.update_rule,
            budget=self.budget,
            rows=self._row_facts,
            initial=values,
            environment=self._environment,
            began_from=self._find_beginning(values),
            counted=self._earlier_runs.checksums,
            calibration=loss.calibration and loss.calibration.describe(),
            recipe=self.used_recipe,
        )
        self._open_log(header, prepared[0])
        if loss.calibration is not None:
            loss.calibration = Calibration.from_description(self._log.header["calibration"])
        self._adapters = list_adapters(self.model)
        mark_as_trained(self.model)
        self._values = TrainedValues(descent.optimizer.parameters())
        if self._log.existing is not None:
            self._log.catch_up(descent, self.lr_scheduler, from_initial=initial)
        self._seal_parameters(descent.optimizer)
        return prepared

    def _open_log(self, header: dict[str, Any], model: torch.nn.Module) -> None:
        """Open the log with `header`. Until here nothing was written, and no private row evaluated on `model`."""
        self._log.open(header, self.model)

    def _find_beginning(self, initial: str | None) -> dict[str, Any] | None:
        """Return the claim of the run that made the initial values, if one is known; see `find_beginning`."""
        if self._log.existing is not None:
            return self._log.existing.header.get("began_from")
        folders = self.args.earlier_runs or []
        find = functools.partial(find_beginning, self.model, initial, output_dir=Path(self.args.output_dir))
        return self._processes.run_on_first(lambda: find(earlier=self._earlier_runs, folders=folders))

    def _read_earlier_runs(self) -> EarlierRuns:
        """Return the runs on the same rows that the epsilon of this one covers; raise `ValueError` if it cannot."""
        folders = self.args.earlier_runs or ()
        refuse_runs_without_a_claim(folders)
        earlier = read_earlier_runs(folders, unit_column=self.args.privacy_unit_column)
        if earlier.releases != self.budget.earlier:
            raise ValueError(
                f"earlier_runs={folders}: their logs have changed since they were read; make a new trainer."
            )
        return earlier

    def _forget_changed_seed(self) -> None:
        # A run that goes on in the same process has moved the model from where its seed put it.
        if not is_marked_as_trained(self.model):
            forget_changed_seed(self.model)

    @abstractmethod
    def _inspect(self, model: torch.nn.Module) -> None:
        """Raise `ValueError` for `model`, as it is prepared for training, if it does not keep rows apart."""

    def _seal_parameters(self, optimizer: ZOOptimizer) -> None:
        """Seal what is trained, for as long as no step moves it."""
        self._seal = Seal(optimizer.parameters)
        self._plain = self._state.capture_plain()

        def look(*_: Any) -> None:
            self._seal.is_broken()  # It remembers what it finds, and all processes are told before the next step.

        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(lambda *_: self._seal.apply(optimizer.swept_checksums()))

    def _refuse_broken_seal(self) -> None:
        """Raise `BrokenSealError` in all processes if something other than a step has moved what one of them trains."""
        if self._processes.all_reduce_max(float(self._seal.is_broken())):
            raise BrokenSealError

    @contextmanager
    def _sealed_apart_from_steps(self) -> Iterator[None]:
        """Move what is trained inside the context; raise `BrokenSealError` if it was moved since the last step."""
        self._refuse_broken_seal()
        for state in self._plain:  # A collator, which sees rows, or a callback may have written there.
            state.restore()
        try:
            yield
        finally:
            self._seal.apply(unwrap_optimizer(self.optimizer).swept_checksums())

    @property
    def _starts_from_initial(self) -> bool:
        """Whether the run starts from the initial values, because no checkpoint holds all that it needs."""
        # A checkpoint of prompt tuning lacks the encoder of its virtual tokens; one of a sharded model would have to be
        # sharded again. Stateful steps depend on all steps before, and an audit on the values that the run began from.
        incomplete = is_prompt_tuned(self.model) or is_sharded(self.model.parameters()) or bool(self.args.canaries)
        incomplete = incomplete or is_stateful(self.method, self.args.update_rule)
        return self._log.checkpoint is None or incomplete

    def _run_epoch(self, *, resume_from_checkpoint: Any, **rest: Any) -> None:
        """Run an epoch as stock does, unless the run is complete. A resumed epoch leaves out the steps it has taken."""
        if self.state.global_step < self.state.max_steps:
            resumed = resume_from_checkpoint or self._log.existing
            super()._run_epoch(resume_from_checkpoint=resumed, **rest)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights as stock does, unless all steps will be replayed."""
        self._forget_changed_seed()
        select_trained_parameters(self._log.existing, self.model)
        if not self._starts_from_initial:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint as stock does, then mark it as complete.

        The weights are hashed once, before anything is saved. If other weights are saved, the mark does not fit them.
        """
        weights = fingerprint_values(self._build_descent().optimizer.parameters())  # All processes must take part.
        self._at_checkpoint = weights
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._at_checkpoint = None
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            self._log.mark_checkpoint(folder, weights=weights, steps=self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save nothing, because optimizer and schedule follow from the log."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load nothing, because optimizer and schedule catch up with the log."""
