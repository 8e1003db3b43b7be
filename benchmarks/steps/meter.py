"""How long steps take, and how much memory the process holds meanwhile."""

import statistics
import time
from pathlib import Path


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # Of proc(5): the peak becomes what is held now.


def resident(name: str = "VmRSS") -> float:
    """Resident memory of this process in MiB: `VmRSS` now, `VmHWM` at its peak."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


class Meter:
    """Measures the steps between `start` and the last `lap`.

    The first step warms up. The peak is that of all steps, and not that of what was done to prepare them.
    """

    def __init__(self) -> None:
        self._laps: list[float] = []
        self._preparing = 0.0

    def start(self) -> None:
        """Call it right before the first step."""
        self._preparing = resident("VmHWM")
        CLEAR.write_text(RESET_PEAK, encoding="ascii")

    def lap(self) -> None:
        """Call it at the end of each step."""
        self._laps.append(time.monotonic())

    def result(self) -> dict[str, float]:
        """Median seconds from one step's end to the next one's, and peaks in MiB while stepping and before."""
        seconds = [later - sooner for sooner, later in zip(self._laps, self._laps[1:], strict=False)]
        return {"seconds": statistics.median(seconds), "peak": resident("VmHWM"), "preparing_peak": self._preparing}
