"""Ctrl-C: a command promises that a run can go on only where it can."""

from pathlib import Path

import pytest

from hf_dpzo import ZOTrainer
from hf_dpzo.cli.main import main
from hf_dpzo.recipe import run


PROMISE = "--resume_from_checkpoint true goes on"


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def stop(write, capsys, monkeypatch):
    """Interrupt a command where it calls a method, and return what is said."""

    def stopped(command, owner, name):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, interrupt)
            assert main([command, write()]) == 130
        return capsys.readouterr().err.strip().splitlines()[-1]

    return stopped


@pytest.mark.parametrize("command", ["plan", "tune"])
def test_a_command_that_takes_no_step_promises_none(stop, command):
    assert stop(command, ZOTrainer, "_inspect") == "hf-dpzo: stopped."


def test_a_run_without_a_log_is_begun_anew(stop, write):
    assert stop("train", run, "load_model") == "hf-dpzo: stopped before the first step."
    assert stop("train", ZOTrainer, "_inspect") == "hf-dpzo: stopped before the first step."
    assert main(["train", write()]) == 0


def test_a_run_that_was_begun_goes_on(stop, write, workplace):
    assert PROMISE in stop("train", ZOTrainer, "training_step")
    assert not Path(workplace / "out" / "adapter_model.safetensors").exists()
    assert main(["train", write(), "--resume_from_checkpoint", "true"]) == 0
