"""The state of a model, which evaluating rows may not change.

A forward pass can write: into weights, into buffers, or into a configuration that is saved with the model. What it
writes depends on rows, and no noise is added to it. So buffers and configurations are put back. A row that would write
into weights fails, and contributes nothing. What escapes that stops the run, or is found before anything is saved.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType

import torch
from torch._dynamo import OptimizedModule

from hf_dpzo.distributed.checksums import checksum, checksum_groups
from hf_dpzo.distributed.sharding import is_sharded, to_local
from hf_dpzo.models.precision import inner_tensors
from hf_dpzo.models.registries import PlainHolders, PlainState, Registries
from hf_dpzo.models.write_guard import ModelChangedError, WriteGuard, put_back


# Buffers up to this size, in bytes, are copied, and put back after each micro-batch.
MAX_COPIED_BYTES = 1 << 24


class ModelState:
    """What a model holds, and the checksums of the tensors that no step moves.

    Args:
        model: the model, with its adapter if it has one.
        moving: the parameters that the optimizer moves.

    >>> model = torch.nn.BatchNorm1d(2)
    >>> state = ModelState(model, moving=model.parameters())
    >>> _ = model.running_mean.add_(1)
    >>> state.find_change()
    'running_mean'
    >>> state.restore_buffers()
    >>> state.find_change(), model.running_mean.tolist()
    (None, [0.0, 0.0])
    """

    def __init__(self, model: torch.nn.Module, *, moving: Iterable[torch.Tensor]) -> None:
        self._model = model
        # The name of a buffer, parameter or module that was put back; `None` if nothing had to be.
        self.restored: str | None = None
        self._registries = Registries(model)
        self._plain = PlainHolders(model)
        tensors = name_tensors(model)
        moving_ids = {id(parameter) for parameter in moving}
        self._moving = {name: tensor for name, tensor in tensors.items() if id(tensor) in moving_ids}
        self._still = {name: tensor for name, tensor in tensors.items() if id(tensor) not in moving_ids}
        self._checksums = {name: checksum_plain(tensor) for name, tensor in self._still.items()}
        small = {n: b for n, b in model.named_buffers() if n in self._still and b.nbytes <= MAX_COPIED_BYTES}
        self._copies = {name: (buffer, buffer.detach().clone()) for name, buffer in small.items()}
        guarded = {name: tensor for name, tensor in tensors.items() if name not in small}
        # What gathers the weights of a sharded model is no operation on its shards.
        self._guard = None if is_sharded(tensors.values()) else WriteGuard(guarded)
        self._counted = [tensor for tensor in guarded.values() if _counts_writes(tensor)]

    def find_change(self) -> str | None:
        """Return the name of a tensor that no step moves and that was changed since; `None` if none was.

        All of them are read once: a billion float32 numbers take about a third of a second.
        """
        present = name_tensors(self._model)
        for name, tensor in self._still.items():
            if present.get(name) is not tensor or checksum_plain(tensor) != self._checksums[name]:
                return name
        return next((name for name in present if name not in self._still and name not in self._moving), None)

    def capture_plain(self) -> list[PlainState]:
        """Return the present states of what is saved with the model besides tensors."""
        return self._plain.capture()

    def restore_buffers(self) -> None:
        """Put back what modules exchanged or added, and the values of buffers; `restored` then names one of them."""
        self.restored = self._registries.restore() or self.restored
        for name, (buffer, copy) in self._copies.items():
            self.restored = name if put_back(buffer, copy) else self.restored

    @contextmanager
    def guarded(self, model: torch.nn.Module) -> Iterator[None]:
        """Let no operation write into weights inside the context, and put buffers back afterwards.

        Args:
            model: the model as it is called. What is compiled cannot be guarded.

        Raises:
            ModelChangedError: an operation was about to write into a weight.
        """
        if self._guard is not None:
            self._guard.look()
        exchanged = None
        try:
            with nullcontext() if self._guard is None or isinstance(model, OptimizedModule) else self._guard:
                yield
        finally:
            self.restore_buffers()
            exchanged = None if self._guard is None else self._guard.put_back_exchanged()
        if exchanged is not None:
            raise ModelChangedError(exchanged)

    @contextmanager
    def held_still(self, known: Mapping[torch.Tensor, int] = MappingProxyType({})) -> Iterator[None]:
        """Compare the model before and after the context, and put its buffers and configurations back.

        Args:
            known: the checksums of parameters that a sweep has just taken, which are not read again before.

        Raises:
            ModelChangedError: a weight was changed.
        """
        plain = self.capture_plain()
        before, writes = checksum_each(self._moving.values(), known), self._count_writes()
        try:
            yield
        finally:
            self.restore_buffers()
            for state in plain:
                state.restore()
        after = checksum_each(self._moving.values())
        changed = next((name for name, old, new in zip(self._moving, before, after, strict=True) if old != new), None)
        # A write that torch does not count is found before anything is saved.
        if changed is None and self._count_writes() != writes:
            changed = self.find_change()
        if changed is not None:
            raise ModelChangedError(changed)

    def _count_writes(self) -> list[int]:
        return [tensor._version for tensor in self._counted]


def name_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of `model` by their names, saved or not; of tied ones the first name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def checksum_each(
    tensors: Iterable[torch.Tensor], known: Mapping[torch.Tensor, int] = MappingProxyType({})
) -> list[int]:
    """Return the checksum of each of `tensors`, reading those that are not `known`."""
    tensors = list(tensors)
    unread = [tensor for tensor in tensors if tensor not in known]
    read = dict(zip(unread, checksum_groups([_list_plain(tensor) for tensor in unread]), strict=True))
    return [known[tensor] if tensor in known else read[tensor] for tensor in tensors]


def checksum_plain(tensor: torch.Tensor) -> int:
    """Return the checksum of what this process holds of `tensor`: of a quantized one, its bits and scales."""
    return checksum(_list_plain(tensor))


def _list_plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(inner_tensors(to_local(tensor.detach())))


def _counts_writes(tensor: torch.Tensor) -> bool:
    """Return whether torch counts the writes into `tensor`."""
    return not tensor.is_inference() and not is_sharded([tensor])
