"""The processes of a run. What they tell each other in a step is a few numbers, whatever the model's size.

Each evaluates its share of the data. The first one alone sees the sum of all shares, adds noise to it once, and tells
the others what was released. Collectives are unconditional: a process takes part in each, also with an empty share.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from hf_dpzo.distributed.sharding import get_shard_index, to_local


T = TypeVar("T")


# What a checksum adds up at once: so many words of 32 bits that int64 holds the sum, and so many sums.
_SUMMED, _SUMS = 1 << 14, 64


_PRIME = 2**63 - 25


class Processes(ABC):
    """All processes of a run, as one of them sees them.

    Args:
        rank: of this one, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the one that draws noise, and writes."""
        return self.rank == 0

    @abstractmethod
    def reduce_sum(self, values: np.ndarray) -> np.ndarray | None:
        """Return the sum of what all processes pass; `None` but in the first one. Exact for int64, in any order."""

    @abstractmethod
    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """Return the first one's `values`; the others pass any of the same shape and type."""

    @abstractmethod
    def all_reduce_max(self, value: float) -> float:
        """Return the largest of all processes' values."""

    @abstractmethod
    def all_equal(self, value: int, part: int = 0) -> bool:
        """Return whether all processes pass the same 63 bits; or all that hold the same `part` of something."""

    @abstractmethod
    def run_on_first(self, function: Callable[[], T]) -> T:
        """Have the first one make something, and return that; raise in all of them what it raises."""

    @abstractmethod
    def broadcast_tensors_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give tensors the first one's values, in place."""


class SingleProcess(Processes):
    """The only process.

    >>> SingleProcess().reduce_sum(np.array([1, 2])).tolist(), SingleProcess().all_equal(3), SingleProcess().is_first
    ([1, 2], True, True)
    """

    rank, size = 0, 1

    def reduce_sum(self, values: np.ndarray) -> np.ndarray:
        """`values`."""
        return values

    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """`values`."""
        return values

    def all_reduce_max(self, value: float) -> float:
        """`value`."""
        return value

    def all_equal(self, value: int, part: int = 0) -> bool:
        """True."""
        return True

    def run_on_first(self, function: Callable[[], T]) -> T:
        """What `make` makes."""
        return function()

    def broadcast_tensors_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing."""


SINGLE_PROCESS = SingleProcess()


class DistributedProcesses(Processes):
    """The processes of torch's default group, which a launcher started.

    Args:
        device: where tensors are that the group's backend sends.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self._device = dist.get_rank(), dist.get_world_size(), device

    def reduce_sum(self, values: np.ndarray) -> np.ndarray | None:
        """As in `Processes`."""
        sent = self._to_tensor(values)
        dist.reduce(sent, dst=0)
        return sent.cpu().numpy() if self.is_first else None

    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """As in `Processes`."""
        sent = self._to_tensor(values)
        dist.broadcast(sent, src=0)
        return sent.cpu().numpy()

    def all_reduce_max(self, value: float) -> float:
        """As in `Processes`."""
        sent = self._to_tensor(np.array([value]))
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        return float(sent)

    def all_equal(self, value: int, part: int = 0) -> bool:
        """As in `Processes`."""
        given = np.full((self.size, 2), -(2**63))
        given[part] = value, -value
        bounds = self._to_tensor(given)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        above, below = bounds.T
        return bool(((above == -below) | (below == -(2**63))).all())

    def run_on_first(self, function: Callable[[], T]) -> T:
        """As in `Processes`."""
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = function()
                pickle.dumps(made)
            except BaseException as error:
                made = [None, _make_picklable(error)]
        dist.broadcast_object_list(made, src=0, device=self._device)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def broadcast_tensors_(self, tensors: Iterable[torch.Tensor]) -> None:
        """As in `Processes`."""
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def _to_tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.copy()).to(self._device)


def _make_picklable(error: BaseException) -> BaseException:
    """An error that other processes can be told of, and can raise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def get_processes(device: torch.device) -> Processes:
    """Return the processes that a launcher started, or this one alone.

    Args:
        device: that this process computes on.
    """
    started = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return DistributedProcesses(device) if started else SINGLE_PROCESS


def refuse_diverged(processes: Processes, tensors: Iterable[torch.Tensor], step: int) -> None:
    """Raise in all processes where they do not hold the same bits, of what they both hold, after so many steps."""
    held = list(tensors)
    if processes.size > 1 and not processes.all_equal(
        checksum(to_local(tensor) for tensor in held), get_shard_index(held)
    ):
        raise RuntimeError(
            f"step={step}: the {processes.size} processes no longer hold the same weights, which a fault of a "
            "machine, or code that changes the model in one of them, would explain; resume from the log, which holds "
            "what was released."
        )


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """A number below 2**63 that tells whether processes hold the same bits; cheap, and no proof against intent.

    >>> checksum([torch.tensor([1.0, 2.0])]) == checksum([torch.tensor([2.0, 1.0])])
    False
    """
    total = 0
    for tensor in tensors:
        for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(4 * _SUMMED * _SUMS):
            missing = -len(piece) % (4 * _SUMMED)
            words = torch.nn.functional.pad(piece, (0, missing)).view(torch.int32).view(-1, _SUMMED)
            odd = torch.arange(1, 2 * _SUMMED, 2, device=words.device)
            for one in (words * odd).sum(dim=1).tolist():  # Exact: below 2**61.
                total = (total * 1_000_003 + one) % _PRIME
    return total
