"""The memory that a run takes: of what the model holds, and of what evaluating rows adds for a while."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hf_dpzo.data.silence import silence
from hf_dpzo.models.precision import inner_tensors
from hf_dpzo.models.set_aside import find_set_aside


# The name of an event in a profile that says that memory was taken, or given back.
_TAKEN = "[memory]"


def count_model_bytes(model: torch.nn.Module) -> int:
    """Return the number of bytes that parameters and buffers of `model` take, also those of a model set aside.

    >>> count_model_bytes(torch.nn.Linear(2, 3))
    36
    """
    tensors = [*model.parameters(), *model.buffers()]
    inner = [part for tensor in tensors for part in inner_tensors(tensor)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in inner}
    held = find_set_aside(model)
    return sum(storages.values()) + (0 if held is None else count_model_bytes(held))


def measure_peak(work: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes more than before tensors take at most while `work` runs.

    >>> measure_peak(lambda: torch.zeros(100).sum(), torch.device("cpu")) >= 400
    True
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder, silence():  # The profiler prints that it begins and ends.
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    taken = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == _TAKEN)
    total = peak = 0
    for _, nbytes in taken:
        total += nbytes
        peak = max(peak, total)
    return peak
