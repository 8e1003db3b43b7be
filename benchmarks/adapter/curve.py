"""Accuracy on held-out rows against the seconds of training."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
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
    """Measures the accuracy on held-out rows before the first step, after the last and between, outside the clock."""

    def __init__(self, accuracy: Callable[[], float], *, every: int, steps: int) -> None:
        self._accuracy, self._every, self._steps = accuracy, every, steps
        self.points: list[tuple[float, float]] = []
        self.clock = Clock()

    def measure(self, step: int) -> None:
        """Add a point after `step` if it is time for one."""
        if step % self._every == 0 or step == self._steps:
            self.points.append((self.clock.seconds, self.clock.without(self._accuracy)))
            sys.stderr.write(f"step {step}: {self.points[-1][0]:.0f} s, {self.points[-1][1]:.4f}\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Measure after a step of a Trainer."""
        self.measure(state.global_step)


@torch.no_grad()
def measure_accuracy(trainer: Any, batch_size: int = 32) -> float:
    """Return the share of held-out rows whose highest score is that of their class."""
    rows, right = trainer.eval_dataset, 0
    for start in range(0, len(rows), batch_size):
        inputs = trainer.data_collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        scores = trainer.per_example_loss.scores(trainer.model, inputs)
        right += int((scores.argmax(dim=1) == inputs["labels"]).sum())
    return right / len(rows)
