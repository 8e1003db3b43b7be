"""The marks of complete checkpoints, and the search for one that belongs to a log."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dpzo.io.files import sync_all, write_atomically
from hf_dpzo.io.foreign import one_sentence
from hf_dpzo.io.strict_json import parse_json
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory


MARK_FILE = "trajectory_checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointMark:
    """A mark that says what a checkpoint holds. It is written last, so a checkpoint without one was never finished.

    Args:
        steps: the number of steps that it has taken.
        checksum: the checksum of the log after these steps.
        weights: the fingerprint of the trained parameters.
    """

    steps: int
    checksum: str
    weights: str

    def save(self, folder: Path) -> None:
        """Write the mark of `folder`, once everything else in it is on disk."""
        sync_all([*folder.rglob("*"), folder.parent])
        write_atomically(folder / MARK_FILE, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Return the mark of `folder`, or `None` if it has none; raise `TrajectoryError` if it cannot be read."""
        path = folder / MARK_FILE
        if not path.is_file():
            return None
        with one_sentence(
            f"{path}: it cannot be read",
            TrajectoryError,
            remedy="delete this folder: the log alone gives the weights back",
        ):
            mark = cls(**parse_json(path.read_text(encoding="utf-8")))
            if type(mark.steps) is not int or mark.steps < 0:
                raise TypeError("steps")
        return mark


def find_checkpoint(folder: Path, log: Trajectory) -> Path | None:
    """Return the newest complete checkpoint of `log` in `folder`, or `None`. Unfinished ones are skipped.

    Raises:
        TrajectoryError: a complete checkpoint is of another run, or of steps that the log does not hold.
    """
    for checkpoint in _sort_newest_first(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if check_checkpoint(checkpoint, log):
            return checkpoint
    return None


def check_checkpoint(folder: Path, log: Trajectory) -> bool:
    """Return whether `folder` is a complete checkpoint; raise `TrajectoryError` if it is one of another run."""
    mark = CheckpointMark.load(folder)
    if mark is None:
        return False
    expected = log.checksum_after(mark.steps).hex() if mark.steps <= len(log.records) else None
    if mark.checksum != expected:
        raise TrajectoryError(
            f"{folder}: the log beside it does not hold the {mark.steps} steps of this checkpoint; what they spent is "
            "not known, so nothing can go on from here: bring the log back, or start a new run elsewhere."
        )
    return True


def _sort_newest_first(folders: Iterable[Path]) -> Iterator[Path]:
    numbered = [(int(match[1]), path) for path in folders if (match := re.search(r"-(\d+)$", path.name))]
    return (path for _, path in sorted(numbered, reverse=True))
