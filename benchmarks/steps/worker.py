"""Measures one contender on one subject, in a process of its own, and prints one line of JSON. `steps.py` calls it.

    python benchmarks/steps/worker.py '{"model": {...}, "trained": "all", "rows": 4, "tokens": 64, "loss": "prompt",
                       "kind": "floor", "options": {}, "steps": 3, "threads": 1}'

Of a list of such jobs it measures one after the other, which saves loading libraries where memory is not compared.
"""

import importlib
import json
import sys
from typing import Any

import torch
from contenders import KINDS
from meter import Meter, resident
from subjects import build


def measured(job: dict[str, Any]) -> dict[str, float]:
    """What `Meter` measures, and how much of the memory is libraries and how many parameters there are."""
    torch.set_num_threads(job["threads"])
    if job["kind"] == "dp-sgd":
        importlib.import_module("dp_sgd")  # Now, so that it counts as a library.
    libraries = resident()
    subject = build(job["model"], **{name: job[name] for name in ("trained", "rows", "tokens", "loss")})
    meter = Meter()
    KINDS[job["kind"]](subject, job["steps"], meter, **job["options"])
    sizes = {
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in subject.trained),
    }
    return {**meter.result(), "libraries": libraries, **sizes}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if isinstance(given, list):
        # Without memory, of which each holds what those before it have left.
        several = [measured(job) for job in given]
        found = [{name: one[name] for name in ("seconds", "parameters", "trained_parameters")} for one in several]
    else:
        found = measured(given)
    sys.stdout.write(f"\n{json.dumps(found)}\n")
