"""By what a row is known, so that what is kept of it is found again: its content."""

import hashlib
import pickle
from collections.abc import Iterator
from typing import Any

import torch

from hf_dpzo.data.collation import MicroBatch
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.frozen.prefix import find_extent
from hf_dpzo.models.unwrap import Inputs


def digest_row(row: Any, inputs: Inputs, place: int) -> bytes | None:
    """Return a digest of the content of a row, and of what a batch holds for each of its tokens, whatever the padding.

    It is of all that the row holds: a loss may give any of it to the model. `None` for a row that has no digest.

    Args:
        row: the row.
        inputs: the batch.
        place: the place of the row in the batch.

    >>> row, ids, mask = {"x": 1}, torch.tensor([[7, 8, 0], [0, 7, 8]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> batch = {"input_ids": ids, "attention_mask": mask}
    >>> one, same, other = digest_row(row, batch, 0), digest_row(row, batch, 1), digest_row({"x": 2}, batch, 0)
    >>> one == same, one == other
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update(pickle.dumps(row))
    except Exception:  # It holds something of a user's own.
        return None
    mask = inputs["attention_mask"]
    extent = find_extent(mask[place])
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == mask.shape:
            own = value[place, extent]
            digest.update(f"{name} {own.dtype} {len(own)} ".encode())
            digest.update(own.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def name_rows(micro_batch: MicroBatch) -> Iterator[tuple[bytes | None, FetchedRow]]:
    """Yield the digest of each row of a micro-batch, and the row."""
    for place, row in enumerate(micro_batch.rows):
        yield digest_row(row.row, micro_batch.inputs, place), row
