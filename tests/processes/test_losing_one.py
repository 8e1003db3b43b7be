"""A process is lost: the job ends, nothing that was logged is, and another number of processes goes on."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_dpzo.trajectory.writer import TrajectoryWriter

from support.models import classifier, with_lora
from support.processes import Here, alone
from support.runs import fingerprint, released, train
from support.stops import Death
from support.sweeps import slow


def model_of(kind: str) -> torch.nn.Module:
    return classifier() if kind == "all parameters" else with_lora(classifier())


def begun(here: Here, kind: str, settings: dict) -> None:
    train(model=model_of(kind), callbacks=[Death(here.rank == 1, after=3)], **settings)


def resumed(here: Here, kind: str, settings: dict) -> str:
    return fingerprint(train(model=model_of(kind), resume=True, **settings))


@pytest.mark.parametrize("size", [1, *slow(3)])
@pytest.mark.parametrize(("kind", "checkpoints"), [("all parameters", "no"), ("adapter", "steps")])
def test_a_lost_process_ends_the_job_and_another_number_of_them_goes_on(kind, checkpoints, size, launched, tmp_path):
    settings = {"output_dir": tmp_path, "max_steps": 5, "save_strategy": checkpoints, "save_steps": 2}
    first, lost = launched[2].ended(begun, kind, settings)
    assert lost.killed and first.error
    before = released(tmp_path)
    assert len(before) in (3, 4)
    if size == 1:
        alone(resumed, kind, settings)
    else:
        assert len(set(launched[size].each(resumed, kind, settings))) == 1
    assert released(tmp_path)[: len(before)] == before
    assert len(released(tmp_path)) == 5


class Kept(TrainerCallback):
    """Leaves a file for each step that a process has taken."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_step_end(self, args, state, control, **kwargs) -> None:
        (self._folder / f"{args.process_index}-{state.global_step}").touch()


def on_a_full_disk(here: Here, kind: str, folder: Path) -> None:
    append = TrajectoryWriter.append

    def full(writer, record, **options) -> None:
        if record.step == 2:
            raise OSError("the disk is full")
        append(writer, record, **options)

    here.patch.setattr(TrajectoryWriter, "append", full)
    train(folder / "run", model=model_of(kind), callbacks=[Kept(folder / "ends")])


@pytest.mark.parametrize("kind", ["all parameters", "adapter"])
def test_no_process_learns_what_could_not_be_logged(kind, pair, tmp_path):
    """The record comes first. So the weights of the others have not moved when the first one fails."""
    ends = tmp_path / "ends"
    ends.mkdir()
    first, second = pair.ended(on_a_full_disk, kind, tmp_path)
    assert "the disk is full" in first.error and second.error
    assert sorted(path.name for path in ends.iterdir()) == ["0-1", "0-2", "1-1", "1-2"]
    assert len(released(tmp_path / "run")) == 2
