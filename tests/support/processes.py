"""Starts several processes that find each other through gloo, as a launcher would, and brings back what they return."""

import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from hf_dpzo.privacy.noise import BernoulliMask, DiscreteGaussian


# In the data of runs whose draws are `frozen`.
ROWS = 40


@dataclass(frozen=True)
class Ended:
    """How a process ended: what it returned, or what it raised, or neither if it was killed."""

    returned: Any = None
    error: str | None = None
    killed: bool = False


def ended(count: int, work: Callable[[int], Any], *, timeout: float = 60.0) -> list[Ended]:
    """Run `work(rank)` in each of `count` processes. Those left after `timeout` seconds fail the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        children = {_child(rank, count, port, work, Path(folder) / str(rank)): rank for rank in range(count)}
        _wait(set(children), timeout)
        files = [Path(folder) / str(rank) for rank in range(count)]
        return [pickle.loads(file.read_bytes()) if file.exists() else Ended(killed=True) for file in files]


def in_each(count: int, work: Callable[[int], Any], *, timeout: float = 60.0) -> list[Any]:
    """As `ended`, where all processes return something."""
    found = ended(count, work, timeout=timeout)
    errors = [f"process {rank}: {one.error or 'killed'}" for rank, one in enumerate(found) if one.error or one.killed]
    assert not errors, "\n".join(errors)
    return [one.returned for one in found]


def _child(rank: int, count: int, port: int, work: Callable[[int], Any], file: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        # As a launcher does; and OpenMP's threads do not survive a fork, so that waiting for them would never end.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        # What a test before has set up in this process' parent.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            found = Ended(returned=work(rank))
            assert count == 1 or dist.get_world_size() == count, "the processes did not find each other"
        except BaseException as error:
            found = Ended(error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        part = file.with_suffix(".part")
        part.write_bytes(pickle.dumps(found))
        part.rename(file)
    finally:
        os._exit(0)


def _wait(children: set[int], timeout: float) -> None:
    until = time.monotonic() + timeout
    while children and time.monotonic() < until:
        children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not children, f"{len(children)} processes had to be killed after {timeout:g} seconds"


def frozen(rank: int, size: int, units: int = ROWS, seed: int = 0) -> None:
    """Make batches and noise the same in each run, whatever the number of processes. In a child's own memory."""
    masks, noises = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])

    def draw(mask: BernoulliMask) -> np.ndarray:
        joins = (masks.random(units) < 0.25)[rank::size]
        assert len(joins) == mask.size
        return joins

    BernoulliMask.draw = draw
    DiscreteGaussian.add = lambda self, values: [
        v + int(n) for v, n in zip(values, noises.integers(-9, 9, len(values)), strict=True)
    ]
