"""Accuracy on held-out rows against the seconds of training."""

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Clock:
    """The seconds since it was started, without those in which it is stopped."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._stopped = 0.0

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return time.perf_counter() - self._started - self._stopped

    def without(self, call: Callable[[], float]) -> float:
        """Return what `call` returns, and do not count its time."""
        begun = time.perf_counter()
        result = call()
        self._stopped += time.perf_counter() - begun
        return result


class Curve(TrainerCallback):
    """Measures the accuracy on some held-out rows during training, and on all of them after the last step.

    Args:
        accuracy: returns the accuracy, for `True` on all rows.
        every: the number of steps from one point to the next.
        steps: the number of all steps.
    """

    def __init__(self, accuracy: Callable[[bool], float], *, every: int, steps: int) -> None:
        self._accuracy, self._every, self._steps = accuracy, every, steps
        # Seconds, accuracy on some rows, and accuracy on all.
        self.points: list[tuple[float, float, float | None]] = []
        self.clock = Clock()

    def measure(self, step: int) -> None:
        """Add a point after `step` if it is time for one."""
        if step % self._every == 0 or step == self._steps:
            seconds = self.clock.seconds
            some = self.clock.without(lambda: self._accuracy(False))
            all_rows = self.clock.without(lambda: self._accuracy(True)) if step == self._steps else None
            self.points.append((seconds, some, all_rows))
            sys.stderr.write(f"step {step}: {seconds:.0f} s, {some:.4f}, {all_rows}\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Measure after a step of a Trainer."""
        self.measure(state.global_step)
