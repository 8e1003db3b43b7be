"""How long steps take on any device, and how much of its memory they need at most."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class Stopwatch(TrainerCallback):
    """The seconds of each step and the peak of the device's memory, after what was begun before has ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[float] = []

    def start(self) -> None:
        """Begin before the first step."""
        gc.collect()
        self._wait()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._laps = [time.perf_counter()]

    def lap(self) -> None:
        """End a step."""
        self._wait()
        self._laps.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the median of all steps but the first."""
        return statistics.median(b - a for a, b in zip(self._laps[1:], self._laps[2:], strict=False))

    def peak(self) -> int | None:
        """Return the peak in bytes, where torch counts it."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Begin before the first step of a Trainer."""
        if state.global_step == 0:
            self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """End a step of a Trainer."""
        self.lap()

    def repeat(self, step: Callable[[], object], times: int) -> None:
        """Take steps."""
        self.start()
        for _ in range(times):
            step()
            self.lap()

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()
