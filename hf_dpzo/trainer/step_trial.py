"""How long a step takes and how much memory, tried on public rows: one micro-batch at a few probe points."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.step.descent import Descent
from hf_dpzo.step.estimate import StepEstimate
from hf_dpzo.trainer.memory import measure_peak
from hf_dpzo.zo.walk import Stop


# At most as many stops of a walk are tried, and as many seconds, but for the first two stops.
MOST_STOPS, MOST_SECONDS = 8, 6.0


@dataclass(frozen=True, kw_only=True)
class StopTimes:
    """What a few stops of a walk took, in seconds of one micro-batch.

    Args:
        moving: to reach a stop.
        first: to evaluate at the first stop of a step, with what all of them share.
        later: to evaluate at another one.
        once: to evaluate at the very first, of which something may be kept for the whole run.
        peak_bytes: the memory that a walk takes for a while.
    """

    moving: float
    first: float
    later: float
    once: float
    peak_bytes: int

    @property
    def keeping(self) -> float:
        """What the very first evaluation of a micro-batch takes beside a first one of a later step.

        >>> StopTimes(moving=0.0, first=2.0, later=1.0, once=5.0, peak_bytes=0).keeping
        3.0
        """
        return max(0.0, self.once - self.first)


@dataclass(frozen=True, kw_only=True)
class StepTrial:
    """What a run takes in time and memory, by a trial on public rows.

    Args:
        rows: what the rows were, such as "made-up rows of 56 tokens".
        times: what a micro-batch took.
        stops: the number of forward passes over each micro-batch of a step.
        points_per_stop: the probe points that one pass evaluates.
        num_directions: K, the directions of a step.
        micro_batches: the number of micro-batches of a step, on average.
        walks_apart: whether each micro-batch makes a walk of its own.
        collating: the seconds that building a micro-batch takes.
        reading: the seconds in which what is computed once of each row is computed, for all rows.
        model_bytes: the memory that the model takes.
        kept_bytes: the memory that is kept for rows, for the whole run.
        processes: the number of processes that share the work.
    """

    rows: str
    times: StopTimes
    stops: int
    points_per_stop: int
    num_directions: int
    micro_batches: int
    walks_apart: bool
    collating: float
    reading: float
    model_bytes: int
    kept_bytes: int
    processes: int = 1

    @property
    def seconds_per_step(self) -> float:
        """The seconds that a step takes on average, without evaluation and saving.

        >>> times = StopTimes(moving=0.0, first=2.0, later=1.0, once=2.0, peak_bytes=0)
        >>> plan = {"stops": 4, "points_per_stop": 1, "num_directions": 2, "micro_batches": 3, "walks_apart": True}
        >>> rest = {"collating": 0.0, "reading": 0.0, "model_bytes": 0, "kept_bytes": 0}
        >>> StepTrial(rows="made-up rows", times=times, **plan, **rest).seconds_per_step
        15.0
        """
        times = self.times
        walks = self.micro_batches if self.walks_apart else 1
        evaluating = self.micro_batches * (times.first + (self.stops - 1) * times.later + self.collating)
        updating = self.num_directions * times.moving / self.points_per_stop
        return (walks * self.stops * times.moving + evaluating) / self.processes + updating

    @property
    def memory_bytes(self) -> int:
        """The memory that model, rows and a step take, without Python and its libraries."""
        return self.model_bytes + self.kept_bytes + self.times.peak_bytes


def time_stops(
    descent: Descent,
    estimate: StepEstimate,
    batch: LogicalBatch,
    evaluate: Callable[[Stop, LogicalBatch], object],
    *,
    points_per_pass: int | None,
    device: torch.device,
) -> StopTimes:
    """Walk through a few probe points of a step with public rows, and return what that took.

    The parameters are the same to the bit afterwards.

    Args:
        descent: the run's descent.
        estimate: the run's estimate.
        batch: one micro-batch of public rows.
        evaluate: a function that evaluates a batch at a stop, as training does.
        points_per_pass: see `Descent.walk`.
        device: the device of the losses.
    """

    def walk(most: int) -> list[tuple[float, float]]:
        times = []
        with estimate.share_work(batch), descent.walk(0, points_per_pass=points_per_pass) as stops:
            reached = began = _read_clock(device)
            for stop in islice(stops, most):
                moved = _read_clock(device)
                evaluate(stop, batch)
                times.append((moved - reached, _read_clock(device) - moved))
                reached = _read_clock(device)
                if len(times) > 1 and reached - began > MOST_SECONDS:
                    break
        return times

    with left_in_place(descent):
        ((_, once),) = walk(1)
        times = walk(MOST_STOPS)
        peak = measure_peak(lambda: walk(1), device)
    moves, evaluations = zip(*times, strict=True)
    later = evaluations[1:] or evaluations
    return StopTimes(
        moving=min(moves[1:] or moves),
        first=evaluations[0],
        later=sum(later) / len(later),
        once=once,
        peak_bytes=peak,
    )


@contextmanager
def left_in_place(descent: Descent) -> Iterator[None]:
    """Give the parameters their values back: a walk that keeps no copy rounds, and leaves them at its last point."""
    parameters = descent.optimizer.parameters()
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        descent.optimizer.settle()
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)


def _read_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
