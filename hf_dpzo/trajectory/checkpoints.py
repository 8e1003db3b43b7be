"""Which checkpoints are whole, and which belong to a log."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dpzo.io.files import sync_all, write_atomically
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory


MARK_FILE = "trajectory_checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointMark:
    """What a checkpoint is of. It is written last, so a checkpoint that has none was never finished.

    Args:
        steps: how many steps it has taken.
        checksum: of the log after these steps.
        weights: the fingerprint of what is trained.
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
        """Read the mark of `folder`; `None` where it has none."""
        path = folder / MARK_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def find_checkpoint(folder: Path, log: Trajectory) -> Path | None:
    """Return the newest whole checkpoint of `log` in `folder`, or `None`. What was never finished is passed over.

    Raises:
        TrajectoryError: a whole checkpoint is of another run, or of steps that the log does not hold.
    """
    for checkpoint in _sort_newest_first(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if check_checkpoint(checkpoint, log):
            return checkpoint
    return None


def check_checkpoint(folder: Path, log: Trajectory) -> bool:
    """Whether `folder` is a whole checkpoint; raise where it is one of another run."""
    mark = CheckpointMark.load(folder)
    if mark is None:
        return False
    known = log.checksum_after(mark.steps).hex() if mark.steps <= len(log.records) else None
    if mark.checksum != known:
        raise TrajectoryError(
            f"{folder}: the log beside it does not hold the {mark.steps} steps of this checkpoint; what they spent is "
            "not known, so nothing can go on from here: bring the log back, or start a new run elsewhere."
        )
    return True


def _sort_newest_first(folders: Iterable[Path]) -> Iterator[Path]:
    numbered = [(int(match[1]), path) for path in folders if (match := re.search(r"-(\d+)$", path.name))]
    return (path for _, path in sorted(numbered, reverse=True))
