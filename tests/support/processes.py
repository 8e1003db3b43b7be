"""Processes that are launched once and do one job after another, in which they find each other through gloo."""

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from hf_dpzo.data import sampling
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian


# In the data of runs whose draws are `frozen`.
ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Here:
    """The process that a job runs in. What the job patches is put back when it ends."""

    rank: int
    size: int
    patch: pytest.MonkeyPatch


Job = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process did a job: what it returned, or what it raised, or neither if it was killed."""

    returned: Any = None
    error: str | None = None
    killed: bool = False


class Processes:
    """Some processes, launched when there is a first job, and anew after one that not all of them did.

    A job is a function of a module, for it is sent by its name. It is called with `Here` and what is given.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._children: dict[int, Connection] = {}

    def each(self, job: Job, *given: Any) -> list[Any]:
        """Return what each process returns for a job. One that raises fails the test."""
        found = self.ended(job, *given)
        failed = {rank: one.error or "killed" for rank, one in enumerate(found) if one.error or one.killed}
        assert not failed, "\n".join(f"process {rank}: {why}" for rank, why in failed.items())
        return [one.returned for one in found]

    def ended(self, job: Job, *given: Any, timeout: float = 120.0) -> list[Ended]:
        """Return how each process ends a job. It is over for one that raises, as in a launched program."""
        if not self._children:
            self._launch()
        pipes = list(self._children.values())
        message, until = pickle.dumps((job, given)), time.monotonic() + timeout
        for pipe in pipes:
            pipe.send_bytes(message)
        found: dict[Connection, Ended] = {}
        while len(found) < self.size and time.monotonic() < until:
            for pipe in wait([pipe for pipe in pipes if pipe not in found], timeout=1.0):
                found[pipe] = _received(pipe)
        if len(found) < self.size or any(one.error or one.killed for one in found.values()):
            self.end()
        assert len(found) == self.size, f"{self.size - len(found)} processes had to be killed after {timeout:g} seconds"
        return [found[pipe] for pipe in pipes]

    def end(self) -> None:
        """End all processes."""
        for child, pipe in self._children.items():
            pipe.close()
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self._children = {}

    def _launch(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pairs = [Pipe() for _ in range(self.size)]
        for rank, (ours, theirs) in enumerate(pairs):
            child = os.fork()
            if not child:
                # A pipe has ended when nobody holds its other end.
                for pipe in (one for pair in pairs[rank:] for one in pair if one is not theirs):
                    pipe.close()
                for pipe in self._children.values():
                    pipe.close()
                _serve(rank, self.size, port, theirs)
            self._children[child] = ours
            theirs.close()


def alone(job: Job, *given: Any) -> Any:
    """Return what a job returns in this process, which nobody launched."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        return job(Here(rank=0, size=1, patch=patch), *given)


def _received(pipe: Connection) -> Ended:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return Ended(killed=True)


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        # As a launcher does; and OpenMP's threads do not survive a fork, so that waiting for them would never end.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        while True:
            done = _done(rank, size, *pipe.recv())
            pipe.send(done)
            if done.error:
                break
    except EOFError:
        pass
    finally:
        os._exit(0)


def _done(rank: int, size: int, job: Job, given: tuple) -> Ended:
    # What a test before has set up in this process' parent, or a job before in this one. The group of processes stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            returned = job(Here(rank=rank, size=size, patch=patch), *given)
        assert dist.get_world_size() == size, "the processes did not find each other"
        return Ended(returned=returned)
    except BaseException as error:
        return Ended(error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def frozen(here: Here, *, units: int = ROWS, seed: int = 0) -> None:
    """Make batches and noise the same in each run, whatever the number of processes."""
    masks, noises = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])

    def draw(mask: BernoulliSampler) -> np.ndarray:
        joins = (masks.random(units) < 0.25)[here.rank :: here.size]
        assert len(joins) == mask.size
        return joins

    def add(noise: DiscreteGaussian, values: list[int]) -> list[int]:
        return [v + int(n) for v, n in zip(values, noises.integers(-9, 9, len(values)), strict=True)]

    here.patch.setattr(sampling, "assign_units", lambda num_units, processes: np.arange(num_units) % processes.size)
    here.patch.setattr(BernoulliSampler, "draw", draw)
    here.patch.setattr(DiscreteGaussian, "add", add)
