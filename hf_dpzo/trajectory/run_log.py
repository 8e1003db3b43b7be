"""The log of one run, as the trainer uses it: created, or found and caught up with; then appended to, and closed."""

import warnings
from pathlib import Path
from typing import Any

import filelock
import torch

from hf_dpzo.distributed.processes import SINGLE_PROCESS, Processes
from hf_dpzo.io.files import refuse_links_in
from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.step.descent import Descent
from hf_dpzo.trajectory.checkpoints import CheckpointMark
from hf_dpzo.trajectory.finding import find_run
from hf_dpzo.trajectory.going_on import refuse_other_parameters, take_over
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import collect_initial_values, restore_initial_values, save_initial_values
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.records import Record
from hf_dpzo.trajectory.replay import check_device, replay_records
from hf_dpzo.trajectory.run_parts import RunParts
from hf_dpzo.trajectory.writer import TrajectoryWriter, acquire_lock


class RunLog:
    """The write-ahead log in the folder of a run.

    Args:
        folder: the run's `output_dir`.
        resume: whether to resume the run in the folder: `True`, the folder itself, or one of its checkpoints.
        planned_steps: the number of steps of the whole run.
        processes: the run's processes. The first one writes. All of them read their start from the same folder.

    Raises:
        LinkError: what the run would write is a link.
        TrajectoryError: there is no run to resume, or a new run would overwrite one.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self, folder: Path, *, resume: bool | str, planned_steps: int, processes: Processes = SINGLE_PROCESS
    ) -> None:
        self._folder = folder
        self._planned_steps = planned_steps
        self._processes = processes
        self._writer: TrajectoryWriter | None = None
        self._lock: filelock.BaseFileLock | None = None
        self.header: dict[str, Any] | None = None
        # Whether the run has started or has been resumed.
        self.was_opened = False
        self.existing: Trajectory | None
        self.checkpoint: Path | None
        # What holds for this part of the run.
        self._environment: dict[str, Any] | None = None
        self.existing, self.checkpoint = processes.run_on_first(lambda: self._lock_and_find(resume))
        # The parts on disk. Only the first process adds to them.
        self._parts = RunParts(folder, () if self.existing is None else self.existing.later_parts)
        # The number of steps on disk, or about to be: other processes do not wait until the first one has written.
        self.num_written = 0 if self.existing is None else len(self.existing.records)

    def _lock_and_find(self, resume: bool | str) -> tuple[Trajectory | None, Path | None]:
        # Held from before the first read until the run ends, so that the log cannot change in between.
        self._lock = self._acquire_lock()
        try:
            return find_run(self._folder, resume)
        except BaseException:
            self._lock.release()
            raise

    @property
    def num_spent_steps(self) -> int:
        """The number of steps whose release is spent. A torn record counts, because an attacker may have seen it."""
        return 0 if self.existing is None else len(self.existing.records) + self._has_torn_record

    def restore_start(self, model: torch.nn.Module, *, from_initial: bool) -> None:
        """Give `model` the initial values that were kept, the trained ones only if the replay starts from them."""
        if self.existing is not None:
            restore_initial_values(model, self._folder, include_trained=from_initial)

    def open(self, header: dict[str, Any], model: torch.nn.Module) -> None:
        """Create the log with `header`, or reopen the existing one if its header is the same.

        Raises:
            TrajectoryError: the existing log is of another model, data size or configuration; the error says what
                differs.
            ValueError: another process has another model, data size or configuration.
            OSError: the folder cannot be written to.
        """
        self._refuse_differing_processes(header)
        path = self._folder / LOG_FILE
        self.header = header if self.existing is None else dict(self.existing.header)
        self._environment = header["made_with"]
        if self.existing is None:
            initial = collect_initial_values(model)
            self._processes.run_on_first(lambda: self._create(path, header, initial))
            self.was_opened = True
            return
        if header["trained"]["initial"] is None:  # The weights are those of a checkpoint.
            header["trained"]["initial"] = self.existing.header["trained"]["initial"]
        refuse_other_parameters(self.existing.header, header, self._folder)
        different = compare_json(self.existing.header, take_over(header, self.existing.header))
        if different:
            said = "; ".join(different[:3]).replace("rows.evaluated_alone=", "(per_device_train_batch_size == 1)=")
            raise TrajectoryError(
                f"resume_from_checkpoint: the log in {self._folder} is of another run: {said}; set what it had, or "
                "start a new run in another folder."
            )
        check_device(self.existing, next(model.parameters()).device)
        self._processes.run_on_first(lambda: self._reopen(path))
        self.was_opened = True

    def _reopen(self, path: Path) -> None:
        self._writer = TrajectoryWriter(path, self.existing)

    def _refuse_differing_processes(self, header: dict[str, Any]) -> None:
        """Raise in all processes if one of them has another model, data size or configuration than the first."""
        different = compare_json(self._processes.run_on_first(lambda: header), header)
        if self._processes.all_reduce_max(float(bool(different))):
            raise ValueError(
                f"processes: {self._processes.size} were launched, and they do not train the same: "
                f"{'; '.join(different[:3]) or 'another one differs from this one'}; load the same model and rows in "
                "each."
            )

    def _acquire_lock(self) -> filelock.BaseFileLock:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            refuse_links_in(self._folder)
            return acquire_lock(self._folder / LOG_FILE)
        except OSError as error:
            raise self._build_write_error(error) from error

    def _build_write_error(self, error: OSError) -> OSError:
        return OSError(
            f"output_dir={self._folder}: the log of the run can not be written there ({error.strerror}); nothing was "
            "trained: make room, or choose another folder."
        )

    def _create(self, path: Path, header: dict[str, Any], initial: dict[str, torch.Tensor]) -> None:
        try:
            self._parts.delete()  # They are of another run, whose log was deleted.
            save_initial_values(initial, self._folder)
            self._writer = TrajectoryWriter.create(path, header)
        except OSError as error:
            raise self._build_write_error(error) from error

    def catch_up(
        self, descent: Descent, scheduler: torch.optim.lr_scheduler.LRScheduler, *, from_initial: bool
    ) -> None:
        """Replay the steps that the log holds and the model has not taken yet, and advance the schedule over all.

        A torn record becomes a void one: its step is spent, and moves nothing.

        Args:
            descent: the descent that moves the parameters.
            scheduler: the schedule of the learning rate, at its beginning.
            from_initial: whether the model is where the run began; otherwise it is at the checkpoint.

        Raises:
            TrajectoryError: the schedule sets other learning rates than the log holds, or the checkpoint's weights are
                not those that were saved.
        """
        first = 0 if from_initial else self._check_weights(descent)
        for record in self.existing.records:
            rates = tuple(group["lr"] for group in descent.optimizer.param_groups)
            if rates != record.learning_rates:
                raise TrajectoryError(
                    f"learning_rate={rates[0]:g} in step {record.step}: the log has {record.learning_rates[0]:g}; "
                    "set the learning rate and the schedule that the run had."
                )
            if record.step >= first:
                replay_records(descent, [record])
            _advance_schedule(scheduler)
        if self._has_torn_record:
            void = self._build_record(
                descent, self.num_spent_steps - 1, (0,) * self.existing.layout.num_directions, void=True
            )
            self._write(void)
            replay_records(descent, [void])
            _advance_schedule(scheduler)

    def append(self, descent: Descent, step: int, integers: tuple[int, ...]) -> None:
        """Write what `step` released to disk, with everything that its update uses. Call this before the update."""
        self._begin_part(step)
        self._write(self._build_record(descent, step, integers))

    def _begin_part(self, step: int) -> None:
        """Before the first release of this part of the run, put its environment on disk if it is another one."""
        environment, self._environment = self._environment, None
        if environment is not None and self._processes.is_first:
            self._parts.begin(step, environment, first=self.header["made_with"])

    def _write(self, record: Record) -> None:
        if self._processes.is_first:
            self._writer.append(record, part=self._parts.find(record.step))
        self.num_written += 1

    def mark_checkpoint(self, checkpoint: Path, *, weights: str, steps: int) -> None:
        """Mark `checkpoint` as complete, in the process that saved it.

        Args:
            checkpoint: the folder of the checkpoint.
            weights: the fingerprint of the trained parameters.
            steps: the number of steps that they have taken.
        """
        CheckpointMark(steps=steps, checksum=self._writer.checksum, weights=weights).save(checkpoint)

    def close(self) -> None:
        """Close the log and release its lock, so that another process may write."""
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.release()

    @property
    def _has_torn_record(self) -> bool:
        return self.existing.torn_bytes > 0 and len(self.existing.records) < self._planned_steps

    def _build_record(self, descent: Descent, step: int, integers: tuple[int, ...], *, void: bool = False) -> Record:
        return Record(
            step=step,
            integers=integers,
            learning_rates=tuple(group["lr"] for group in descent.optimizer.param_groups),
            smoothing=descent.begin(step).smoothing,
            mask_fingerprint=descent.mask_fingerprint,
            void=void,
            begins_part=self._parts.find(step) is not None,
        )

    def _check_weights(self, descent: Descent) -> int:
        mark = CheckpointMark.load(self.checkpoint)
        if fingerprint_values(descent.optimizer.parameters()) != mark.weights:
            raise TrajectoryError(
                f"{self.checkpoint}: its weights are not those that were saved; delete this folder, and the log alone "
                "gives them back."
            )
        return mark.steps


def _advance_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Advance the schedule by a step that the optimizer took earlier, or below the wrapper that it watches."""
    with warnings.catch_warnings():
        # torch 2.13 takes this for a mistake. Remove when a scheduler can be given the number of steps that were taken.
        warnings.filterwarnings("ignore", message=".*optimizer.step", category=UserWarning)
        scheduler.step()
