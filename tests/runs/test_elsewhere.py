"""Another process, with other threads, order of sets and folder: the same bits, and the same findings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_dpzo import seeded_peft_model

from support.models import classifier, word_tokenizer
from support.runs import train
from support.sweeps import slow


# Whose sums of floats are those over many entries, which threads would share.
WIDE = {"hidden_size": 64, "vocab_size": 4096, "num_hidden_layers": 1}
RUNS = {
    "rademacher": {},
    "sphere": {"directions": "sphere"},
    "projected": {"method": "projected", "radius": 0.01},
}
# Replays the runs on two threads, and verifies the adapter of the last one from another folder.
SCRIPT = """
import os, sys, torch
from pathlib import Path
from hf_dpzo.cli.main import main
from hf_dpzo.trajectory.replay import rebuild_model

torch.set_num_threads(2)
folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    rebuild_model(str(folder / "base"), folder / name).save_pretrained(folder / "again" / name)
os.chdir(folder / "elsewhere")
sys.exit(main(["verify", str(folder / "adapter"), "--base", "mirror"]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a base model, runs of all its parameters, a run of an adapter, and a copy of the base elsewhere."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    classifier(**WIDE).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    for name, settings in RUNS.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        train(folder / name, model=model, **settings).save_model()
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    # PEFT keeps names of modules in sets, whose order is another one in each process.
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"])
    # As many steps as it takes to see that their noise varies.
    train(folder / "adapter", model=seeded_peft_model(base, config, seed=1), max_steps=40).save_model()
    shutil.copytree(folder / "base", folder / "elsewhere" / "mirror")
    return folder


@pytest.fixture(scope="module", params=["1", *slow("2", "3")])
def ran(request, trained) -> subprocess.CompletedProcess:
    """What a fresh interpreter did, with that order of sets."""
    environment = {**os.environ, "PYTHONHASHSEED": request.param, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SCRIPT, str(trained), *RUNS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", RUNS)
def test_replays_do_not_depend_on_the_number_of_threads(name, ran, trained):
    """Sums of floats would, if threads shared them."""
    again, saved = (load_file(folder / name / "model.safetensors") for folder in (trained / "again", trained))
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def test_another_process_and_another_place_verify_alike(ran):
    assert ran.returncode == 0, ran.stdout + ran.stderr[-500:]
