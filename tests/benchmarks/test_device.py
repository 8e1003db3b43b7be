"""The script for a device runs on a CPU too, and says whether a run there replays to the bit."""

import importlib
import json
import subprocess
import sys
import time

import pytest
import torch

from support.paths import MEASUREMENTS


@pytest.fixture(scope="module")
def device():
    """The script's module."""
    folders = [str(MEASUREMENTS), str(MEASUREMENTS / "steps")]
    sys.path[:0] = folders
    yield importlib.import_module("device")
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture
def plan(device):
    size = {"shapes": device.QUICK, "rows": 2, "tokens": 8, "directions": (1, 2), "steps": 2}
    return device.Plan(device=torch.device("cpu"), until=time.monotonic(), **size)


def test_a_run_and_its_replay_are_compared_bit_for_bit(device, plan, monkeypatch):
    assert device.check_bits(plan)
    monkeypatch.setattr(device, "replay_onto", lambda *_: None)
    assert not device.check_bits(plan)


def test_sweeps_are_compared_with_reading_and_writing_all_parameters_once(device, plan):
    (shape,) = plan.shapes
    size = sum(p.numel() for p in plan.build(shape, torch.float32, lora=False).parameters())
    first, second = device.measure_sweeps(plan, shape, bandwidth=8.0 * size)
    assert (first["K"], second["K"]) == (1, 2)
    assert first["over"] == pytest.approx(first["seconds"])  # At eight bytes a coordinate, the bound is one second.


def test_cases_for_which_no_time_is_left_are_named(device, plan, monkeypatch):
    monkeypatch.setattr(device, "check_bits", lambda plan: False)
    found = device.measure(plan)
    assert found["left out"] == ["tiny, sweeps", "tiny, all", "tiny, LoRA"]
    shown = device.report(found)
    assert shown.startswith("cpu, torch") and "OTHER BITS" in shown and "Left out for want of time: tiny, sw" in shown


@pytest.mark.slow
def test_the_command_prints_its_tables_and_writes_its_figures(tmp_path):
    output = tmp_path / "device.json"
    command = [sys.executable, MEASUREMENTS / "device.py", "--device", "cpu", "--quick", "--output", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["bits are those of the CPU"] and not found["left out"]
    assert [case["contender"] for case in found["steps"]] == [
        *("ours, K = 1", "MeZO as published", "ours, K = 2"),
        *("ours, K = 1", "ours, K = 2"),
    ]
    assert "| OPT | trained | contender |" in run.stdout
