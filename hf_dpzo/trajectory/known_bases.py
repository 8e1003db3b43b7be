"""Where this machine found the base models of its own runs, which their logs name and nobody else may tell it.

A log may name a folder, and a stranger's log any folder of this machine. So a folder is opened only where the user
names it, or where a run of this very user began, which is kept in the user's cache by the checksum of the log's header.
"""

import logging
from pathlib import Path

from huggingface_hub import constants

from hf_dpzo.io.files import write_atomically
from hf_dpzo.trajectory.log import Trajectory


logger = logging.getLogger(__name__)


# The longest path that is read.
_MAX_BYTES = 1 << 13


def remember_base(log: Trajectory, place: str) -> None:
    """Keep `place`, a folder or a file of this machine, as the base model of the run of `log`, for this user alone."""
    path = _find_path(log)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, place.encode(), secretly=True)
    except OSError as error:  # A home that cannot be written to.
        logger.info("%s: the place of the base model was not kept (%s).", path, error.strerror)


def recall_base(log: Trajectory) -> str | None:
    """Return the place of the base model of the run of `log`, if it ran here and the place is still there."""
    path = _find_path(log)
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    place = path.read_text(encoding="utf-8", errors="replace")
    return place if Path(place).exists() else None


def _find_path(log: Trajectory) -> Path:
    return Path(constants.HF_HOME) / "hf_dpzo" / "bases" / log.header_checksum.hex()
