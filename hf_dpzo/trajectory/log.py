"""The trajectory of a run on disk: a write-ahead log of what was released, from which the weights can be rebuilt.

A file is a magic line, a header (JSON, with its length before it and its SHA-256 behind it), and one record of fixed
size for each step. Each record carries the first 16 bytes of a SHA-256 over the record before it and itself, so that no
record can be changed, dropped or moved without those behind it becoming wrong. A record is on disk before the weights
move. It takes `40 + 8 * groups + 8 * K` bytes: 64 for one direction and the Trainer's two parameter groups.

All that is in it is public: what left through a mechanism, and what the run was configured with.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import filelock

from hf_dpzo.io.files import write_atomically
from hf_dpzo.trajectory.header import MAX_HEADER_BYTES, TrajectoryError, parse_header
from hf_dpzo.trajectory.records import CHECKSUM_BYTES, Record, RecordLayout, Records


LOG_FILE = "trajectory.zo"


MAGIC = b"hf_dpzo trajectory 1\n"


# Bytes of a whole file: a million steps of one direction. A reader holds no more than these, twice.
MAX_LOG_BYTES = 1 << 26


_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a file holds.

    Args:
        header: what the run was configured with.
        records: of the steps, in order.
        header_checksum: the checksum of the header.
        torn_bytes: bytes behind the last whole record. They are of a step whose release somebody may have seen.
    """

    header: Mapping[str, Any]
    records: Records
    header_checksum: bytes
    torn_bytes: int

    @property
    def layout(self) -> RecordLayout:
        """How the records are laid out."""
        return layout_from_header(self.header)

    def checksum_after(self, steps: int) -> bytes:
        """The checksum that stands for the log up to a step."""
        return self.records.checksum_at(steps - 1) if steps else self.header_checksum

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the log at `path`, a file or the folder of a run. Anybody may have written it.

        Guarantee: it runs nothing, holds less than 1 GB, and what it returns is of the shape that the schema asks for.

        Raises:
            TrajectoryError: there is none, or one that is damaged before its last record, or that no run writes.
        """
        path = Path(path) / LOG_FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise TrajectoryError(f"{path}: there is no log of a run; name its folder, or its {LOG_FILE}.")
        with open(path, "rb") as file:
            data = file.read(MAX_LOG_BYTES + 1)
        try:
            return cls._parse(data)
        except TrajectoryError as error:
            raise TrajectoryError(f"{path}: {error}") from error

    @classmethod
    def _parse(cls, data: bytes) -> Self:
        if len(data) > MAX_LOG_BYTES:
            raise TrajectoryError(f"it has more than {MAX_LOG_BYTES} bytes, and no log has; name another file.")
        header, checksum, start = _split_header(data)
        layout, count, before = layout_from_header(header), 0, checksum
        steps, there, most = header["plan"]["steps"], len(data) - start, MAX_LOG_BYTES - start
        if not there // layout.record_size <= steps <= most // layout.record_size:
            raise TrajectoryError(f"plan.steps={steps}: there are more records, or no log holds so many.")
        for begin in range(start, len(data) - layout.record_size + 1, layout.record_size):
            piece = data[begin : begin + layout.record_size]
            record = layout.unpack(piece, before)
            if record is None or record.step != count:
                if begin + layout.record_size < len(data):
                    raise TrajectoryError(f"record {count} is damaged; replay a copy of the log.")
                break
            if not record.is_finite:
                raise TrajectoryError(f"record {record.step} holds a number that is not finite; replay another copy.")
            if record.void and any(record.integers):
                raise TrajectoryError(f"record {record.step} is void, and holds a release; replay another copy.")
            count, before = count + 1, piece[-CHECKSUM_BYTES:]
        end = start + count * layout.record_size
        records = Records(layout=layout, data=data[start:end])
        return cls(header=header, records=records, header_checksum=checksum, torn_bytes=len(data) - end)


class TrajectoryWriter:
    """Appends records to a log, each on disk before `append` returns. For a process that holds its lock.

    Args:
        path: the file, which exists.
        log: what it holds.
    """

    def __init__(self, path: Path, log: Trajectory) -> None:
        self._path, self._layout, self.steps = path, log.layout, len(log.records)
        self._before = log.checksum_after(self.steps)
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - it stays open for as long as the run does.
        # Over the torn bytes, if there are any: they are fewer than the next record has.
        self._file.seek(-log.torn_bytes, os.SEEK_END)

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """Create the log with `header`, whole or not at all.

        Raises:
            TrajectoryError: nobody could read it.
            OSError: the folder can not be written to.
        """
        text = json.dumps(header, sort_keys=True, allow_nan=False).encode()
        start = MAGIC + _LENGTH.pack(len(text)) + text
        data = start + hashlib.sha256(start).digest()
        steps = parse_header(text, remedy="a run like that can not be logged: simplify it")["plan"]["steps"]
        largest = MAX_LOG_BYTES - len(data)
        if steps * layout_from_header(header).record_size > largest:
            raise TrajectoryError(
                f"max_steps={steps}: a log of {MAX_LOG_BYTES >> 20} MiB, the most that is read, holds "
                f"{largest // layout_from_header(header).record_size} of these steps; lower it, or num_directions."
            )
        write_atomically(path, data)
        return cls(path, Trajectory.read(path))

    def append(self, record: Record) -> None:
        """Append `record`, and wait until it is on disk.

        Raises:
            ValueError: it holds a number that is not finite.
            OSError: it could not be written. The records before it are as they were; the run must stop, and what was
                written of this one tells a resumed run that its step is spent.
        """
        if record.step != self.steps:
            raise RuntimeError(f"step={record.step}: the log expects step {self.steps}.")
        if not record.is_finite:
            raise ValueError(
                f"learning_rate={record.learning_rates}: step {record.step} can not take it; correct the schedule."
            )
        data = self._layout.pack(record, self._before)
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
        self._before, self.steps = data[-CHECKSUM_BYTES:], self.steps + 1

    @property
    def checksum(self) -> str:
        """The checksum of the last record, which stands for the whole log up to it."""
        return self._before.hex()

    def close(self) -> None:
        """Append no more."""
        self._file.close()


def acquire_lock(path: Path) -> filelock.BaseFileLock:
    """Lock the log at `path` for this process, from before it is read or made until the lock is released.

    Raises:
        TrajectoryError: another process holds it.
    """
    lock = filelock.FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise TrajectoryError(f"{path}: another process writes this log; wait for it, or stop it.") from None
    return lock


def layout_from_header(header: Mapping[str, Any]) -> RecordLayout:
    """Return the layout that `header` asks for."""
    return RecordLayout(num_directions=header["num_directions"], num_groups=len(header["groups"]))


def _split_header(data: bytes) -> tuple[dict[str, Any], bytes, int]:
    """Return the header, its checksum, and where the records begin."""
    if not data.startswith(MAGIC):
        raise TrajectoryError(f"it is no log that this version reads; it should begin with {MAGIC!r}.")
    (length,) = _LENGTH.unpack(data[len(MAGIC) :][: _LENGTH.size].ljust(_LENGTH.size, b"\xff"))
    end = len(MAGIC) + _LENGTH.size + length
    checksum = hashlib.sha256(data[:end]).digest()
    if length > MAX_HEADER_BYTES or data[end : end + len(checksum)] != checksum:
        raise TrajectoryError("its header is damaged; replay a copy of the log.")
    return parse_header(data[end - length : end]), checksum[:CHECKSUM_BYTES], end + len(checksum)
