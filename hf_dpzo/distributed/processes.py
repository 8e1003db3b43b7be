"""The processes of a run, and the few numbers that they exchange in each step, whatever the model's size.

Each process evaluates its share of the data. The first process alone sees the sum of all shares. It adds noise to the
sum once, and broadcasts what was released. Every process takes part in every collective, even with an empty share.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from hf_dpzo.distributed.checksums import checksum
from hf_dpzo.distributed.sharding import get_shard_index, to_local


T = TypeVar("T")


class Processes(ABC):
    """All processes of a run, as one of them sees them.

    Args:
        rank: the rank of this process, from 0.
        size: the number of processes.
    """

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the process that draws the noise and writes the files."""
        return self.rank == 0

    @abstractmethod
    def reduce_sum(self, values: np.ndarray) -> np.ndarray | None:
        """Return the sum over all processes in the first one, `None` in the others. Exact for int64, in any order."""

    @abstractmethod
    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """Return the `values` of the first process. The others pass any array of the same shape and type."""

    @abstractmethod
    def all_reduce_max(self, value: float) -> float:
        """Return the largest `value` that a process passes."""

    @abstractmethod
    def all_equal(self, value: int, part: int = 0) -> bool:
        """Return whether all processes that pass the same `part` pass the same `value`.

        Args:
            value: a number from 0 to 2**63 - 1.
            part: the index of the shard that `value` describes, below the number of processes.
        """

    @abstractmethod
    def run_on_first(self, function: Callable[[], T]) -> T:
        """Run `function` in the first process alone, and return its result, or raise its error, in all of them."""

    @abstractmethod
    def broadcast_tensors_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors`, in place, with those of the first process."""


class SingleProcess(Processes):
    """The only process of a run, for which every collective is trivial.

    >>> SingleProcess().reduce_sum(np.array([1, 2])).tolist(), SingleProcess().all_equal(3), SingleProcess().is_first
    ([1, 2], True, True)
    """

    rank = 0
    size = 1

    def reduce_sum(self, values: np.ndarray) -> np.ndarray:
        """Return `values`."""
        return values

    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """Return `values`."""
        return values

    def all_reduce_max(self, value: float) -> float:
        """Return `value`."""
        return value

    def all_equal(self, value: int, part: int = 0) -> bool:
        """Return `True`, because there is no other value."""
        return True

    def run_on_first(self, function: Callable[[], T]) -> T:
        """Return the result of `function`."""
        return function()

    def broadcast_tensors_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave `tensors` as they are."""


SINGLE_PROCESS = SingleProcess()


class DistributedProcesses(Processes):
    """The processes of torch's default group, which a launcher started.

    Args:
        device: the device of the tensors that the group's backend sends.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = device

    def reduce_sum(self, values: np.ndarray) -> np.ndarray | None:
        """See `Processes.reduce_sum`."""
        buffer = self._to_tensor(values)
        dist.reduce(buffer, dst=0)
        return buffer.cpu().numpy() if self.is_first else None

    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """See `Processes.broadcast`."""
        buffer = self._to_tensor(values)
        dist.broadcast(buffer, src=0)
        return buffer.cpu().numpy()

    def all_reduce_max(self, value: float) -> float:
        """See `Processes.all_reduce_max`."""
        buffer = self._to_tensor(np.array([value]))
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
        return float(buffer)

    def all_equal(self, value: int, part: int = 0) -> bool:
        """See `Processes.all_equal`."""
        # Values agree where the largest is the smallest, which is minus the maximum of -value: one exchange finds both.
        own_bounds = np.full((self.size, 2), -(2**63))
        own_bounds[part] = value, -value
        bounds = self._to_tensor(own_bounds)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        largest, minus_smallest = bounds.T
        return bool(((largest == -minus_smallest) | (minus_smallest == -(2**63))).all())

    def run_on_first(self, function: Callable[[], T]) -> T:
        """See `Processes.run_on_first`."""
        outcome: list[Any] = [None, None]  # The result, and the error.
        if self.is_first:
            try:
                outcome[0] = function()
                pickle.dumps(outcome)
            except BaseException as error:
                outcome = [None, _make_picklable(error)]
        dist.broadcast_object_list(outcome, src=0, device=self._device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def broadcast_tensors_(self, tensors: Iterable[torch.Tensor]) -> None:
        """See `Processes.broadcast_tensors_`."""
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def _to_tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.copy()).to(self._device)


def _make_picklable(error: BaseException) -> BaseException:
    """Return `error`, or a `RuntimeError` with its text where it cannot be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def get_processes(device: torch.device) -> Processes:
    """Return the processes that a launcher started, or this one alone.

    Args:
        device: the device that this process computes on.
    """
    is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return DistributedProcesses(device) if is_distributed else SINGLE_PROCESS


def refuse_diverged(processes: Processes, tensors: Iterable[torch.Tensor], step: int) -> None:
    """Raise `RuntimeError` in all processes where two that hold the same shard of `tensors` hold different bits.

    Args:
        processes: the run's processes.
        tensors: the tensors to compare, sharded or not.
        step: the number of steps taken, for the message.
    """
    tensors = list(tensors)
    if processes.size > 1 and not processes.all_equal(
        checksum(to_local(tensor) for tensor in tensors), get_shard_index(tensors)
    ):
        raise RuntimeError(
            f"step={step}: the {processes.size} processes no longer hold the same weights, which a fault of a "
            "machine, or code that changes the model in one of them, would explain; resume from the log, which holds "
            "what was released."
        )
