"""Appends the records of a run to its log, of which one process at a time holds the lock."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import filelock

from hf_dpzo.io.files import open_plain, refuse_links, write_atomically
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory, encode_start
from hf_dpzo.trajectory.parts import Part
from hf_dpzo.trajectory.records import CHECKSUM_BYTES, Record


class TrajectoryWriter:
    """Appends records to a log. Each is on disk before `append` returns. The process must hold the log's lock.

    Args:
        path: the existing file.
        log: the content of that file.
    """

    def __init__(self, path: Path, log: Trajectory) -> None:
        self._path = path
        self._layout = log.layout
        self.steps = len(log.records)
        self._checksum = log.checksum_after(self.steps)
        # It stays open as long as the run lasts.
        self._file = open(open_plain(path, writable=True), "r+b", buffering=0)  # noqa: SIM115
        # The next record overwrites any torn bytes, since it is longer than they are.
        self._file.seek(-log.torn_bytes, os.SEEK_END)

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """Create the log with `header`, atomically.

        Raises:
            TrajectoryError: no reader would accept the log.
            OSError: the folder cannot be written to.
        """
        data, _ = encode_start(header)
        write_atomically(path, data)
        return cls(path, Trajectory.read(path))

    def append(self, record: Record, *, part: Part | None = None) -> None:
        """Append `record`, and wait until it is on disk.

        Args:
            record: the record of the next step.
            part: the part that begins with it, which is on disk; `None` if none does.

        Raises:
            RuntimeError: the record is not of the next step.
            ValueError: the record holds a number that is not finite.
            OSError: the record could not be written. The records before it are intact. The run must stop; the part
                that was written tells a resumed run that the step is spent.
        """
        if record.step != self.steps:
            raise RuntimeError(f"step={record.step}: the log expects step {self.steps}.")
        if not record.is_finite:
            raise ValueError(
                f"learning_rate={record.learning_rates}: step {record.step} can not take it; correct the schedule."
            )
        data = self._layout.pack(record, self._checksum + (b"" if part is None else part.digest))
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"{self._path}: step {record.step} could not be written ({error.strerror}); the {record.step} steps "
                "before it are safe: make room, and go on with resume_from_checkpoint=True."
            ) from error
        self._checksum = data[-CHECKSUM_BYTES:]
        self.steps += 1

    @property
    def checksum(self) -> str:
        """The checksum of the last record, in hexadecimal. It identifies the whole log up to that record."""
        return self._checksum.hex()

    def close(self) -> None:
        """Close the file; nothing can be appended after that."""
        self._file.close()


def acquire_lock(path: Path) -> filelock.BaseFileLock:
    """Lock the log at `path` for this process, until the returned lock is released.

    Take the lock before the log is read or created.

    Raises:
        LinkError: the log, or its lock, is a link.
        TrajectoryError: another process holds the lock.
    """
    lock_path = path.with_name(f"{path.name}.lock")
    refuse_links(path, lock_path)  # The lock would be made, and emptied, where the link leads.
    lock = filelock.FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise TrajectoryError(f"{path}: another process writes this log; wait for it, or stop it.") from None
    return lock
