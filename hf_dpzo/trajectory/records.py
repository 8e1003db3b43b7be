"""The records of a log: one of fixed size for each step, each with a checksum over itself and the one before."""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


CHECKSUM_BYTES = 16


_FRONT = struct.Struct("<IIdQ")


_VOID = 1


_BEGINS_PART = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The record of one step.

    Args:
        step: the number of the step, from 0.
        integers: the released sums, one for each direction, in units of the mechanism's lattice.
        learning_rates: the learning rate of each parameter group.
        smoothing: the mu of the step's stage.
        mask_fingerprint: a fingerprint of the coordinates that could move; 0 if all could.
        void: whether the release is unknown, because its record was torn. The step counts as spent.
        begins_part: whether a part of the run in another environment begins with this step. See `parts.py`.
    """

    step: int
    integers: tuple[int, ...]
    learning_rates: tuple[float, ...]
    smoothing: float
    mask_fingerprint: int = 0
    void: bool = False
    begins_part: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether all numbers of the record are finite, as in every run."""
        return all(math.isfinite(number) for number in (self.smoothing, *self.learning_rates))


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """The layout of the records of a file.

    Args:
        num_directions: K, the number of directions of a step.
        num_groups: the number of the optimizer's parameter groups.

    >>> layout = RecordLayout(num_directions=1, num_groups=2)
    >>> layout.record_size
    64
    >>> record = Record(step=0, integers=(-5,), learning_rates=(0.5, 0.5), smoothing=1e-3)
    >>> layout.unpack(layout.pack(record, bytes(16)), bytes(16)) == record
    True
    """

    num_directions: int
    num_groups: int

    @property
    def record_size(self) -> int:
        """The size of a record, in bytes."""
        return _FRONT.size + 8 * (self.num_groups + self.num_directions) + CHECKSUM_BYTES

    def pack(self, record: Record, previous_checksum: bytes) -> bytes:
        """Return the bytes of `record`; they end with a checksum over `previous_checksum` and the record.

        Where a part begins, its digest follows the previous checksum.
        """
        flags = _VOID * record.void | _BEGINS_PART * record.begins_part
        front = _FRONT.pack(record.step, flags, record.smoothing, record.mask_fingerprint)
        body = front + self._values.pack(*record.learning_rates, *record.integers)
        return body + _checksum(previous_checksum, body)

    def begins_part(self, data: bytes) -> bool:
        """Return whether the record in `data` says that a part begins with it, whether or not its checksum is right."""
        return bool(_FRONT.unpack_from(data)[1] & _BEGINS_PART)

    def unpack(self, data: bytes, previous_checksum: bytes) -> Record | None:
        """Return the record in `data`, or `None` if its checksum is wrong."""
        body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        return (
            self.unpack_unchecked(data)
            if len(data) == self.record_size and checksum == _checksum(previous_checksum, body)
            else None
        )

    def unpack_unchecked(self, data: bytes) -> Record:
        """Return the record in `data`, whose checksum must have been checked before."""
        step, flags, smoothing, mask = _FRONT.unpack_from(data)
        values = self._values.unpack_from(data, _FRONT.size)
        return Record(
            step=step,
            integers=values[self.num_groups :],
            learning_rates=values[: self.num_groups],
            smoothing=smoothing,
            mask_fingerprint=mask,
            void=bool(flags & _VOID),
            begins_part=bool(flags & _BEGINS_PART),
        )

    @property
    def _values(self) -> struct.Struct:
        return struct.Struct(f"<{self.num_groups}d{self.num_directions}q")


@dataclass(frozen=True, kw_only=True)
class Records(Sequence[Record]):
    """Records in their form on disk, each unpacked on access. As objects they would take 8 times the memory.

    Args:
        layout: the layout of each record.
        data: the bytes of all records, one after the other. Their checksums have been checked.
    """

    layout: RecordLayout
    data: bytes

    def __len__(self) -> int:
        return len(self.data) // self.layout.record_size

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self[position] for position in range(len(self))[index])
        return self.layout.unpack_unchecked(self._piece(range(len(self))[index]))

    def checksum_at(self, index: int) -> bytes:
        """Return the checksum of the record at `index`, 16 bytes."""
        return self._piece(index)[-CHECKSUM_BYTES:]

    def _piece(self, index: int) -> bytes:
        return self.data[index * self.layout.record_size : (index + 1) * self.layout.record_size]


def _checksum(previous_checksum: bytes, body: bytes) -> bytes:
    return hashlib.sha256(previous_checksum + body).digest()[:CHECKSUM_BYTES]
