"""A digest of the content of rows, which two processes compare to know that they hold the same."""

import datetime
import hashlib
import pickle
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from datasets.features.features import require_decoding
from torch.utils.data import Dataset

from hf_dpzo.data.sampling import DrawnRow, SealedRows
from hf_dpzo.data.sealed import WithheldError, run_sealed


# The number of rows that are read at once.
_BLOCK = 1000


# Types whose values follow from their texts.
_PLAIN_TYPES = (str, bytes, int, float, bool, type(None), complex, Decimal, datetime.date, datetime.datetime)


class UnknownContentError(ValueError):
    """A row has a value whose content cannot be compared."""


def digest_tables(dataset: Dataset) -> bytes:
    """Return a digest of the rows as they are on disk, at some hundred MB a second.

    Equal digests mean equal rows. Equal rows may have different ones, such as where a type's size differs. Without
    tables, or where reading a row looks elsewhere, the digest is one that no other data set has.
    """
    # A subclass may read its rows in another way.
    if type(dataset) is not datasets.Dataset or looks_elsewhere(dataset):
        return np.random.default_rng().bytes(32)
    digest = hashlib.sha256()
    raw = dataset.with_format("arrow")
    for first in range(0, len(raw), _BLOCK):
        table = raw[first : min(first + _BLOCK, len(raw))].replace_schema_metadata(None).combine_chunks()
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return digest.digest()


def looks_elsewhere(dataset: datasets.Dataset) -> bool:
    """Return whether a transform, or the decoding of a file that a table only names, makes the rows."""
    is_transformed = dataset.format["type"] == "custom"
    return is_transformed or any(map(require_decoding, (dataset.features or {}).values()))


def digest_rows(dataset: Dataset) -> bytes:
    """Return a digest of all rows, read one by one. Equal digests mean equal rows, in the same order.

    A row that cannot be read has no content.

    Raises:
        UnknownContentError: a value is of a type that does not say what it holds.
    """
    rows = SealedRows(dataset)
    digest = hashlib.sha256()
    for first in range(0, len(dataset), _BLOCK):
        block = [DrawnRow(unit=0, row=row, slot=0) for row in range(first, min(first + _BLOCK, len(dataset)))]
        fetched = [row.row for row in rows.__getitems__(block)]
        try:
            digest.update(run_sealed("train_dataset", lambda held=fetched: digest_value(held)))
        except WithheldError:
            raise UnknownContentError(
                "train_dataset: its rows hold values that can not be compared between processes; return numbers, "
                "texts, lists, arrays and tensors."
            ) from None
    return digest.digest()


def digest_value(value: Any) -> bytes:
    """Return a digest that is the same for the same content, in any process, and for no other content.

    Raises:
        Exception: what pickling raises, for a value of a type of which only that can tell the content.

    >>> digest_value([np.int64(1)]) == digest_value([np.int64(2)])
    False
    """
    digest = hashlib.sha256()
    for part in _describe(value):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _describe(value: Any) -> Iterator[bytes]:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"array {value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        yield from sorted(digest_value(name) + digest_value(item) for name, item in value.items())
    elif isinstance(value, set | frozenset):
        yield f"set {len(value)}".encode()
        yield from sorted(digest_value(item) for item in value)
    elif isinstance(value, list | tuple) and set(map(type, value)) == {int}:
        yield f"integers {list(value)}".encode()
    elif isinstance(value, list | tuple | np.ndarray):
        yield f"list {len(value)}".encode()
        for item in value:
            yield from _describe(item)
    elif kind in _PLAIN_TYPES:
        yield f"{kind.__name__} {value!r}".encode()
    else:
        yield b"pickle"
        yield pickle.dumps(value, protocol=5)
