"""`hf-dpzo train` in several processes."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from hf_dpzo.cli.main import main
from hf_dpzo.trajectory.log import Trajectory

from support.processes import Here
from support.recipes import table


def printed(here: Here, recipe: str) -> str:
    here.patch.setattr(dist, "destroy_process_group", lambda *_: None)  # By which the command leaves the others.
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["train", recipe]) == 0
    return out.getvalue()


def test_one_of_several_processes_reports(pair, write, workplace):
    first, second = pair.each(printed, write())
    assert table(first)["processes"] == "2"
    assert first.count("epsilon") == 1 and "epsilon" not in second
    assert len(Trajectory.read(workplace / "out").records) == 2
    assert main(["verify", str(workplace / "out")]) in (0, 3)  # Two steps are too few to see that their noise varies.


@pytest.mark.slow
def test_accelerate_launches_several_processes_of_which_one_reports(write, workplace):
    """With `--cpu` it would silently start one: see `--use_cpu` in the recipe."""
    launcher = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launcher += " --dynamo_backend no --module hf_dpzo"
    command = [sys.executable, "-W", "ignore", "-m", *launcher.split(), "train", write()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert table(ran.stdout)["processes"] == "2"
    assert ran.stdout.count("epsilon") == 1
    assert len(Trajectory.read(workplace / "out").records) == 2
    assert main(["verify", str(workplace / "out")]) in (0, 3)  # As above.
