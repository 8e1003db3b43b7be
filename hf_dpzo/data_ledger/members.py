"""Which units of privacy a run used, as numbers that only the holder of a ledger's key can compute.

They tell runs on the very same rows from runs on rows that overlap in part, whatever the order of the rows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import datasets
import numpy as np

from hf_dpzo.data.content import digest_value, looks_elsewhere
from hf_dpzo.data.sampling import DrawnRow, SealedRows
from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.data.units import read_users


# The number of rows that are read at once.
_BLOCK = 1000


# Of the digest of a unit. Two units with equal ones count as one, which errs on the safe side.
_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Members:
    """The units of a data set. SENSITIVE: kept in the ledger alone.

    Args:
        form: a digest of what the units are told apart by. Units of different forms cannot be compared.
        digests: the digests of all units, sorted, uint64 `[units]`; `None` where units cannot be told apart, so that
            they may be those of any other data set.
    """

    form: bytes
    digests: np.ndarray | None

    @classmethod
    def of(cls, dataset: Any, *, unit_column: str | None, key: bytes) -> Self:
        """Return the units of `dataset`, in which each row is read once, under seal.

        Args:
            dataset: the rows.
            unit_column: the column that says whose a row is; `None` if each row is a unit.
            key: the secret key of the ledger.
        """
        if unit_column is not None:
            try:
                users = {digest_value(user) for user in read_users(dataset, unit_column)}
            except WithheldError:
                return cls(form=_hash("users, unknown", key), digests=None)
            return cls(form=_hash(f"users of {unit_column}", key), digests=_digest_all(users, key))
        contents = None if _varies(dataset) else _read_contents(dataset)
        if contents is None:
            return cls(form=_hash("rows, unknown", key), digests=None)
        names, rows = contents
        return cls(form=_hash(f"rows of {sorted(names)}", key), digests=_digest_all(rows, key))

    def as_bytes(self) -> bytes | None:
        """Return the digests as bytes, in an order that does not depend on the machine."""
        return None if self.digests is None else self.digests.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, form: bytes, members: bytes | None) -> Self:
        """Return the units that `as_bytes` wrote."""
        return cls(form=form, digests=None if members is None else np.frombuffer(members, dtype="<u8"))

    def identity(self, key: bytes) -> bytes:
        """Return what the same units have in common, whatever their order."""
        return hashlib.blake2b(self.form + (self.as_bytes() or b""), key=key, digest_size=16).digest()


def _digest_all(units: Any, key: bytes) -> np.ndarray:
    digests = (hashlib.blake2b(unit, key=key, digest_size=_BYTES).digest() for unit in units)
    return np.sort(np.frombuffer(b"".join(digests), dtype="<u8"))


def _hash(text: str, key: bytes) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), key=key, digest_size=16).digest()


def _varies(dataset: Any) -> bool:
    """Return whether a transform makes the rows, which may be other ones at each look."""
    return isinstance(dataset, datasets.Dataset) and looks_elsewhere(dataset)


def _read_contents(dataset: Any) -> tuple[set[str], list[bytes]] | None:
    """Return the names of all columns, and a digest of each row; `None` if a row's content cannot be compared."""
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.with_format(None)  # The same values, whatever they are shown as.
    rows, names, contents = SealedRows(dataset), set(), []
    for first in range(0, len(dataset), _BLOCK):
        drawn = [DrawnRow(unit=0, row=row, slot=0) for row in range(first, min(first + _BLOCK, len(dataset)))]
        fetched = [row.row for row in rows.__getitems__(drawn)]
        names |= {str(name) for row in fetched if isinstance(row, Mapping) for name in row}
        try:
            contents += run_sealed("train_dataset", lambda held=fetched: [digest_value(row) for row in held])
        except WithheldError:
            return None
    return names, contents
