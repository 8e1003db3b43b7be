"""What is computed for public rows while a model is tried on them, remembered once a second time has given the same."""

from collections.abc import Sequence

import torch

from hf_dpzo.frozen.store import RowStore


# The memory for what is remembered of public rows. It is touched only where entries are.
REMEMBERED_BYTES = 1 << 28


class RepeatedStore:
    """A store that gives an entry back only after the same bits were put into it twice.

    So work that depends on anything but its row is done again each time, and shows. Numbers that are not finite are
    never given back: whoever tries a model makes neighbours NaN.

    >>> store = RepeatedStore(RowStore(torch.empty(256, dtype=torch.uint8)))
    >>> store.put(b"row", [torch.ones(1)])
    >>> store.get(b"row", torch.device("cpu")) is None
    True
    >>> store.put(b"row", [torch.ones(1)])
    >>> store.get(b"row", torch.device("cpu"))
    [tensor([1.])]
    """

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._repeated: set[bytes] = set()

    def get(self, key: bytes, device: torch.device) -> list[torch.Tensor] | None:
        """Return the entry under `key` on `device`, which is not to be written to; `None` if it was not put twice."""
        return self._store.get(key, device) if key in self._repeated else None

    def put(self, key: bytes, tensors: Sequence[torch.Tensor]) -> None:
        """Keep `tensors` under `key` if there is room, or compare them with those that are kept there."""
        before = self._store.get(key, torch.device("cpu"))
        if before is None:
            self._store.put(key, tensors)
        elif all(torch.equal(one, other.cpu()) for one, other in zip(before, tensors, strict=True)):
            self._repeated.add(key)
