"""The trajectory of a run on disk: a write-ahead log of what was released, from which the weights can be rebuilt.

A file is a magic line, a header (JSON, with its length before it and its SHA-256 after it), and one record of fixed
size for each step. Each record ends with a checksum: the first 16 bytes of a SHA-256 over the checksum before it and
the record. So no record can be changed, dropped or moved without invalidating those after it. A record is on disk
before the weights move. It takes `40 + 8 * groups + 8 * K` bytes: 64 for one direction and the Trainer's two parameter
groups.

Everything in a log is public: what a mechanism released, and how the run was configured.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import filelock

from hf_dpzo.io.files import open_plain, refuse_links, write_atomically
from hf_dpzo.trajectory.header import MAX_HEADER_BYTES, TrajectoryError, parse_header
from hf_dpzo.trajectory.parts import PARTS_FILE, PARTS_REMEDY, Part, read_later_parts
from hf_dpzo.trajectory.records import CHECKSUM_BYTES, Record, RecordLayout, Records


if TYPE_CHECKING:
    import pandas as pd

    from hf_dpzo.plots import Figure


LOG_FILE = "trajectory.zo"


MAGIC = b"hf_dpzo trajectory 1\n"


# The largest file that is read, in bytes: a million steps of one direction. A reader holds at most twice as much.
MAX_LOG_BYTES = 1 << 26


_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The content of a log.

    Args:
        header: the configuration of the run.
        records: the records of the steps, in order.
        header_checksum: the checksum of the header, 16 bytes.
        torn_bytes: the number of bytes after the last whole record. They belong to a step whose release an attacker may
            have seen.
        later_parts: the parts of the run that went on in another environment, in order. A kill after an entry and
            before its first release leaves a last one that has no record yet.
    """

    header: Mapping[str, Any]
    records: Records
    header_checksum: bytes
    torn_bytes: int
    later_parts: tuple[Part, ...] = ()

    @property
    def layout(self) -> RecordLayout:
        """The layout of the records."""
        return layout_from_header(self.header)

    def checksum_after(self, steps: int) -> bytes:
        """Return the checksum of the log after its first `steps` steps, 16 bytes."""
        return self.records.checksum_at(steps - 1) if steps else self.header_checksum

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the run that a release came from, the first as the header has it. A torn record counts."""
        spent = len(self.records) + (self.torn_bytes > 0)
        later = (part for part in self.later_parts if part.first_step < spent)
        return Part(first_step=0, environment=self.header["made_with"]), *later

    def to_pandas(self) -> "pd.DataFrame":
        """Return a table with a row for each step, from 1.

        Its columns are `epsilon`, an upper bound on what was spent up to this step (missing without privacy),
        `learning_rate` of the first parameter group, `smoothing`, `lost`, which says whether the release of a torn
        record is unknown, and `coefficient_0` and so on: the released coefficient of each direction, a noisy mean over
        the expected batch, in units of the loss over the smoothing.
        """
        from hf_dpzo.trajectory.table import tabulate

        return tabulate(self)

    def plot(self) -> "Figure":
        """Return a picture of the run, which needs matplotlib: epsilon, learning rate and coefficients by step."""
        from hf_dpzo.plots import draw_trajectory

        return draw_trajectory(self.to_pandas())

    def _repr_html_(self) -> str:
        from hf_dpzo.trajectory.table import format_log

        return format_log(self)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the log at `path`, a file or the folder of a run, and the parts beside it. They may be a stranger's.

        Guarantee: reading runs nothing and takes less than 1 GB, and the header has the shape that the schema asks for.

        Raises:
            TrajectoryError: there is no log, or it is damaged before its last record, or no run writes such a log, or
                its parts are not beside it as they were.
        """
        path = Path(path) / LOG_FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise TrajectoryError(f"{path}: there is no log of a run; name its folder, or its {LOG_FILE}.")
        with open(path, "rb") as file:
            data = file.read(MAX_LOG_BYTES + 1)
        parts = read_later_parts(path.parent)
        try:
            return cls._parse(data, parts)
        except TrajectoryError as error:
            raise TrajectoryError(f"{path}: {error}") from error

    @classmethod
    def _parse(cls, data: bytes, parts: tuple[Part, ...]) -> Self:
        if len(data) > MAX_LOG_BYTES:
            raise TrajectoryError(f"it has more than {MAX_LOG_BYTES} bytes, and no log has; name another file.")
        header, checksum, start = _split_header(data)
        layout = layout_from_header(header)
        steps = header["plan"]["steps"]
        most = (MAX_LOG_BYTES - start) // layout.record_size
        if not (len(data) - start) // layout.record_size <= steps <= most:
            raise TrajectoryError(f"plan.steps={steps}: there are more records, or no log holds so many.")
        digests = {part.first_step: part.digest for part in parts}
        count = 0
        previous_checksum = checksum
        for begin in range(start, len(data) - layout.record_size + 1, layout.record_size):
            piece = data[begin : begin + layout.record_size]
            digest = digests.pop(count, b"")
            if bool(digest) != layout.begins_part(piece):
                raise _build_parts_error(count)
            record = layout.unpack(piece, previous_checksum + digest)
            if record is None or record.step != count:
                if digest:
                    raise _build_parts_error(count)
                if begin + layout.record_size < len(data):
                    raise TrajectoryError(f"record {count} is damaged; replay a copy of the log.")
                break
            _check_record(record)
            count += 1
            previous_checksum = piece[-CHECKSUM_BYTES:]
        if any(first_step > count for first_step in digests):
            raise _build_parts_error(count)
        end = start + count * layout.record_size
        records = Records(layout=layout, data=data[start:end])
        return cls(
            header=header,
            records=records,
            header_checksum=checksum,
            torn_bytes=len(data) - end,
            later_parts=parts,
        )


def _check_record(record: Record) -> None:
    """Raise `TrajectoryError` for a record that no run writes."""
    if not record.is_finite:
        raise TrajectoryError(f"record {record.step} holds a number that is not finite; replay another copy.")
    if record.void and any(record.integers):
        raise TrajectoryError(f"record {record.step} is void, and holds a release; replay another copy.")


def _build_parts_error(step: int) -> TrajectoryError:
    return TrajectoryError(
        f"{PARTS_FILE}: by record {step}, the run's parts are others than those in it, or it is not there; "
        f"{PARTS_REMEDY}."
    )


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
        text = json.dumps(header, sort_keys=True, allow_nan=False).encode()
        start = MAGIC + _LENGTH.pack(len(text)) + text
        data = start + hashlib.sha256(start).digest()
        steps = parse_header(text, remedy="a run like that cannot be logged: simplify it")["plan"]["steps"]
        largest = MAX_LOG_BYTES - len(data)
        if steps * layout_from_header(header).record_size > largest:
            raise TrajectoryError(
                f"max_steps={steps}: a log of {MAX_LOG_BYTES >> 20} MiB, the most that is read, holds "
                f"{largest // layout_from_header(header).record_size} of these steps; lower it, or num_directions."
            )
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


def layout_from_header(header: Mapping[str, Any]) -> RecordLayout:
    """Return the layout of records that `header` asks for."""
    return RecordLayout(num_directions=header["num_directions"], num_groups=len(header["groups"]))


def _split_header(data: bytes) -> tuple[dict[str, Any], bytes, int]:
    """Return the header, its checksum, and the offset of the first record."""
    if not data.startswith(MAGIC):
        raise TrajectoryError(f"it is no log that this version reads; it should begin with {MAGIC!r}.")
    (length,) = _LENGTH.unpack(data[len(MAGIC) :][: _LENGTH.size].ljust(_LENGTH.size, b"\xff"))
    end = len(MAGIC) + _LENGTH.size + length
    checksum = hashlib.sha256(data[:end]).digest()
    if length > MAX_HEADER_BYTES or data[end : end + len(checksum)] != checksum:
        raise TrajectoryError("its header is damaged; replay a copy of the log.")
    return parse_header(data[end - length : end]), checksum[:CHECKSUM_BYTES], end + len(checksum)
