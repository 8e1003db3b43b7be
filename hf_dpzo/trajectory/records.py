"""The records of a log: one of fixed size for each step, each with a checksum over itself and the one before it."""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


# Bytes of a checksum.
CHECKSUM_BYTES = 16


_FRONT = struct.Struct("<IIdQ")


_VOID = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One step.

    Args:
        step: from 0.
        integers: what was released, one for each direction.
        learning_rates: the learning rate of each parameter group.
        smoothing: mu of the step's stage.
        mask_fingerprint: a fingerprint of the coordinates that could move; 0 where all could.
        void: whether nothing is known of what was released: its record was torn. The step counts as spent.
    """

    step: int
    integers: tuple[int, ...]
    learning_rates: tuple[float, ...]
    smoothing: float
    mask_fingerprint: int = 0
    void: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are, as those of every run are."""
        return all(math.isfinite(one) for one in (self.smoothing, *self.learning_rates))


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """How the records of a file are laid out.

    Args:
        num_directions: K.
        num_groups: how many parameter groups the optimizer has.

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
        """Bytes of a record."""
        return _FRONT.size + 8 * (self.num_groups + self.num_directions) + CHECKSUM_BYTES

    def pack(self, record: Record, previous_checksum: bytes) -> bytes:
        """Return the bytes of `record`, which end with its checksum; `previous_checksum` is the one before it."""
        front = _FRONT.pack(record.step, _VOID * record.void, record.smoothing, record.mask_fingerprint)
        body = front + self._values.pack(*record.learning_rates, *record.integers)
        return body + _checksum(previous_checksum, body)

    def unpack(self, data: bytes, previous_checksum: bytes) -> Record | None:
        """Return the record in `data`, or `None` where its checksum is wrong."""
        body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        return (
            self.unpack_unchecked(data)
            if len(data) == self.record_size and checksum == _checksum(previous_checksum, body)
            else None
        )

    def unpack_unchecked(self, data: bytes) -> Record:
        """Return the record in `data`, whose checksum is right."""
        step, flags, smoothing, mask = _FRONT.unpack_from(data)
        values = self._values.unpack_from(data, _FRONT.size)
        return Record(
            step=step,
            integers=values[self.num_groups :],
            learning_rates=values[: self.num_groups],
            smoothing=smoothing,
            mask_fingerprint=mask,
            void=bool(flags & _VOID),
        )

    @property
    def _values(self) -> struct.Struct:
        return struct.Struct(f"<{self.num_groups}d{self.num_directions}q")


@dataclass(frozen=True, kw_only=True)
class Records(Sequence[Record]):
    """Records as they are on disk, each unpacked when it is asked for: as objects, they would take 8 times the memory.

    Args:
        layout: of each.
        data: their bytes, one after the other. Their checksums are right.
    """

    layout: RecordLayout
    data: bytes

    def __len__(self) -> int:
        return len(self.data) // self.layout.record_size

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(len(self))[index])
        return self.layout.unpack_unchecked(self._piece(range(len(self))[index]))

    def checksum_at(self, index: int) -> bytes:
        """The checksum of one of them."""
        return self._piece(index)[-CHECKSUM_BYTES:]

    def _piece(self, index: int) -> bytes:
        return self.data[index * self.layout.record_size : (index + 1) * self.layout.record_size]


def _checksum(before: bytes, body: bytes) -> bytes:
    return hashlib.sha256(before + body).digest()[:CHECKSUM_BYTES]
