"""The log of one run, as the trainer uses it: begun, or found and caught up with; appended to; closed."""

import warnings
from pathlib import Path
from typing import Any

import filelock
import torch

from hf_dpzo.distributed.processes import ALONE, Processes
from hf_dpzo.io.strict_json import differences
from hf_dpzo.models.fingerprints import values_fingerprint
from hf_dpzo.step.descent import Descent
from hf_dpzo.trajectory.checkpoints import CheckpointMark, check_checkpoint, find_checkpoint
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import initial_values, restore_initial, save_initial
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory, TrajectoryWriter, locked
from hf_dpzo.trajectory.records import Record
from hf_dpzo.trajectory.replay import check_device, replay


class RunLog:
    """The write-ahead log in the folder of a run.

    Args:
        folder: the run's `output_dir`.
        resume: whether to go on with the run that is there: `True`, the folder, or one of its checkpoints.
        planned_steps: how many steps the whole run has.
        processes: of the run. The first one writes; all read what they begin with in the same folder.

    Raises:
        TrajectoryError: there is no such run, or one that would be overwritten.
    """

    def __init__(self, folder: Path, *, resume: bool | str, planned_steps: int, processes: Processes = ALONE) -> None:
        self._folder, self._planned, self._processes = folder, planned_steps, processes
        self._writer: TrajectoryWriter | None = None
        self._lock: filelock.BaseFileLock | None = None
        self.header: dict[str, Any] | None = None
        # Whether the run has begun, or gone on.
        self.opened = False
        self.found: Trajectory | None
        self.checkpoint: Path | None
        self.found, self.checkpoint = processes.by_first(lambda: self._begin(resume))
        # How many steps are on disk, or in the first process are about to be.
        self.written = 0 if self.found is None else len(self.found.records)

    def _begin(self, resume: bool | str) -> tuple[Trajectory | None, Path | None]:
        # Before anything is read, and until the run is over: what it counts on must not change under it.
        self._lock = self._locked()
        try:
            return self._find(resume)
        except BaseException:
            self._lock.release()
            raise

    def _find(self, resume: bool | str) -> tuple[Trajectory | None, Path | None]:
        folder = self._folder
        if resume:
            if not (folder / LOG_FILE).is_file():
                raise TrajectoryError(
                    f"resume_from_checkpoint={resume}: output_dir={folder} holds no log of a run; leave it out to "
                    "start one."
                )
            found = Trajectory.read(folder)
            return found, self._chosen(resume, found)
        if (folder / LOG_FILE).exists():
            raise TrajectoryError(
                f"output_dir={folder}: it holds the log of a run; go on with that by resume_from_checkpoint=True, or "
                "choose another folder for a new one."
            )
        return None, None

    @property
    def steps(self) -> int:
        """How many steps are spent; one whose record was torn among them, for somebody may have seen it."""
        return 0 if self.found is None else len(self.found.records) + self._torn

    def start_from(self, model: torch.nn.Module, *, initial: bool) -> None:
        """Give `model` what was kept of where the run began; of what is trained only if the replay starts there."""
        if self.found is not None:
            restore_initial(model, self._folder, trained=initial)

    def open(self, header: dict[str, Any], model: torch.nn.Module) -> None:
        """Begin the log with `header`, or see that the one that was found has the same, and be ready to append.

        Raises:
            TrajectoryError: the log belongs to another model, data size or configuration; it says what differs.
            OSError: the folder can not be written to.
        """
        self._refuse_other_process(header)
        path = self._folder / LOG_FILE
        self.header = header if self.found is None else dict(self.found.header)
        if self.found is None:
            initial = initial_values(model)
            self._processes.by_first(lambda: self._create(path, header, initial))
            self.opened = True
            return
        if header["trained"]["initial"] is None:  # The weights are those of a checkpoint.
            header["trained"]["initial"] = self.found.header["trained"]["initial"]
        # On another machine, or with other versions, a run may go on; the log keeps what it began with.
        different = differences(self.found.header, header | {"made_with": self.found.header["made_with"]})
        if different:
            raise TrajectoryError(
                f"resume_from_checkpoint: the log in {self._folder} is of another run: {'; '.join(different[:3])}; set "
                "what it had, or start a new run in another folder."
            )
        check_device(self.found, next(model.parameters()).device)
        self._processes.by_first(lambda: self._go_on(path))
        self.opened = True

    def _go_on(self, path: Path) -> None:
        self._writer = TrajectoryWriter(path, self.found)

    def _refuse_other_process(self, header: dict[str, Any]) -> None:
        """Raise in all processes where one of them has another model, data size or configuration than the first."""
        found = differences(self._processes.by_first(lambda: header), header)
        if self._processes.largest(float(bool(found))):
            raise ValueError(
                f"processes: {self._processes.size} were launched, and they do not train the same: "
                f"{'; '.join(found[:3]) or 'another one differs from this one'}; load the same model and rows in each."
            )

    def _locked(self) -> filelock.BaseFileLock:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return locked(self._folder / LOG_FILE)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(
            f"output_dir={self._folder}: the log of the run can not be written there ({error.strerror}); nothing was "
            "trained: make room, or choose another folder."
        )

    def _create(self, path: Path, header: dict[str, Any], initial: dict[str, torch.Tensor]) -> None:
        try:
            save_initial(initial, self._folder)
            self._writer = TrajectoryWriter.create(path, header)
        except OSError as error:
            raise self._unwritable(error) from error

    def catch_up(self, descent: Descent, scheduler: torch.optim.lr_scheduler.LRScheduler, *, initial: bool) -> None:
        """Take the steps that the log holds and the model does not have yet, and the schedule with them.

        Args:
            descent: what moves the parameters.
            scheduler: sets the learning rate; at its beginning.
            initial: whether the model has taken none of them; else it is at the checkpoint.

        Raises:
            TrajectoryError: the schedule would have set other learning rates.
        """
        first = 0 if initial else self._check_weights(descent)
        for record in self.found.records:
            rates = tuple(group["lr"] for group in descent.optimizer.param_groups)
            if rates != record.rates:
                raise TrajectoryError(
                    f"learning_rate={rates[0]:g} in step {record.step}: the log has {record.rates[0]:g}; set the "
                    "learning rate and the schedule that the run had."
                )
            if record.step >= first:
                replay(descent, [record])
            _advance(scheduler)
        if self._torn:
            void = self._record(descent, self.steps - 1, (0,) * self.found.layout.num_directions, void=True)
            self._write(void)
            replay(descent, [void])
            _advance(scheduler)

    def append(self, descent: Descent, step: int, integers: tuple[int, ...]) -> None:
        """Put what `step` released on disk, with all that its update will use, before that."""
        self._write(self._record(descent, step, integers))

    def _write(self, record: Record) -> None:
        if self._processes.first:
            self._writer.append(record)
        self.written += 1

    def mark(self, checkpoint: Path, *, weights: str, steps: int) -> None:
        """Say that `checkpoint` is whole, with the fingerprint of what is trained; in the process that saved it."""
        CheckpointMark(steps=steps, checksum=self._writer.checksum, weights=weights).save(checkpoint)

    def close(self) -> None:
        """Let others write."""
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.release()

    @property
    def _torn(self) -> bool:
        return self.found.torn > 0 and len(self.found.records) < self._planned

    def _record(self, descent: Descent, step: int, integers: tuple[int, ...], *, void: bool = False) -> Record:
        return Record(
            step=step,
            integers=integers,
            rates=tuple(group["lr"] for group in descent.optimizer.param_groups),
            smoothing=descent.begin(step).smoothing,
            mask=descent.mask_fingerprint,
            void=void,
        )

    def _check_weights(self, descent: Descent) -> int:
        mark = CheckpointMark.load(self.checkpoint)
        if values_fingerprint(descent.optimizer.parameters()) != mark.weights:
            raise TrajectoryError(
                f"{self.checkpoint}: its weights are not those that were saved; delete this folder, and the log alone "
                "gives them back."
            )
        return mark.steps

    def _chosen(self, resume: bool | str, found: Trajectory) -> Path | None:
        """The checkpoint that was asked for, or the newest whole one."""
        if resume is True or Path(resume).resolve() == self._folder.resolve():
            return find_checkpoint(self._folder, found)
        if Path(resume).resolve().parent != self._folder.resolve():
            raise TrajectoryError(
                f"resume_from_checkpoint={resume}: it is neither True nor a checkpoint in output_dir={self._folder}; "
                "pass one of these."
            )
        if not Path(resume).is_dir():
            raise TrajectoryError(
                f"resume_from_checkpoint={resume}: there is no such checkpoint; pass True, which finds the newest."
            )
        if not check_checkpoint(Path(resume), found):
            raise TrajectoryError(
                f"resume_from_checkpoint={resume}: it was never finished; pass True, which finds the newest that was."
            )
        return Path(resume)


def _advance(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Step the schedule, for a step that the optimizer took before, or below the wrapper that the schedule watches."""
    with warnings.catch_warnings():
        # torch 2.13 takes it for a mistake. Remove when schedulers can be told how many steps were taken.
        warnings.filterwarnings("ignore", message=".*optimizer.step", category=UserWarning)
        scheduler.step()
