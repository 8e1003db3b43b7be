"""Finds the run in a folder: one to go on with, or none where a new one is to begin. Nothing is written."""

import os
from pathlib import Path

from hf_dpzo.io.files import refuse_links_in
from hf_dpzo.trajectory.checkpoints import check_checkpoint, find_checkpoint
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory


def find_run(folder: Path, resume: bool | str) -> tuple[Trajectory | None, Path | None]:
    """Return the log of the run in `folder` and the checkpoint to go on from; `None` for both if a new one begins.

    Args:
        folder: the run's `output_dir`.
        resume: whether to resume the run in the folder: `True`, the folder itself, or one of its checkpoints.

    Raises:
        TrajectoryError: there is no run to resume, or a new run would overwrite one.
    """
    if resume:
        if not (folder / LOG_FILE).is_file():
            raise TrajectoryError(
                f"resume_from_checkpoint={resume}: output_dir={folder} holds no log of a run; leave it out to "
                "start one."
            )
        log = Trajectory.read(folder)
        return log, _choose_checkpoint(folder, resume, log)
    if (folder / LOG_FILE).exists():
        raise TrajectoryError(
            f"output_dir={folder}: it holds the log of a run; go on with that by resume_from_checkpoint=True "
            "(--resume_from_checkpoint true), or choose another folder for a new one."
        )
    return None, None


def refuse_folder(folder: Path, resume: bool | str) -> None:
    """Raise what a run in `folder` would raise, before anything is loaded for it. See `find_run` for the arguments.

    Raises:
        LinkError: what the run would write is a link.
        TrajectoryError: there is no run to resume, or a new run would overwrite one.
        OSError: the folder cannot be written to.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise OSError(f"output_dir={folder}: {there} is no folder; choose another for the run.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"output_dir={folder}: nothing can be written to {there}; choose another folder for the run.")
    refuse_links_in(folder)
    find_run(folder, resume)


def _choose_checkpoint(folder: Path, resume: bool | str, log: Trajectory) -> Path | None:
    """Return the checkpoint that `resume` names, or the newest complete one."""
    if resume is True or Path(resume).resolve() == folder.resolve():
        return find_checkpoint(folder, log)
    if Path(resume).resolve().parent != folder.resolve():
        raise TrajectoryError(
            f"resume_from_checkpoint={resume}: it is neither True nor a checkpoint in output_dir={folder}; "
            "pass one of these."
        )
    if not Path(resume).is_dir():
        raise TrajectoryError(
            f"resume_from_checkpoint={resume}: there is no such checkpoint; pass True, which finds the newest."
        )
    if not check_checkpoint(Path(resume), log):
        raise TrajectoryError(
            f"resume_from_checkpoint={resume}: it was never finished; pass True, which finds the newest that was."
        )
    return Path(resume)
