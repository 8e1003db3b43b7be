"""Facts of the whole run: what held for any part of it is on disk before its first release, and the worst is stated."""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.card.files import STALE_PATTERNS
from hf_dpzo.card.repository import refresh_card
from hf_dpzo.card.upload import copy_log
from hf_dpzo.cli.main import main
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.trainer import checking
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import LOG_FILE
from hf_dpzo.trajectory.parts import PARTS_FILE
from hf_dpzo.trajectory.writer import TrajectoryWriter
from hf_dpzo.verification.verify import verify

from support.runs import train


class Killed(BaseException):
    """What nothing in the library catches."""


class Stop(TrainerCallback):
    def __init__(self, *, after: int) -> None:
        self._after = after

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self._after:
            raise Killed


STEPS = 9


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def go_on(monkeypatch, folder):
    """Train up to some step, as a process does in which rows move each other so far, and that version is installed."""

    def run(up_to: int = STEPS, *, loss_change: float = 0.0, version: str = "1.0", **changes) -> ZOTrainer | None:
        versions = {"torch": version, "hf_dpzo": "1"}
        resume = (folder / LOG_FILE).exists()
        with monkeypatch.context() as patch:
            patch.setattr(checking, "measure_isolation", lambda *_, **__: Isolation(loss_change=loss_change))
            patch.setattr(checking, "collect_versions", lambda: versions)
            torch.manual_seed(0)  # The same base each time, as a script that loads one has it.
            stops = [Stop(after=up_to)] if up_to < STEPS else []
            settings = {"max_steps": STEPS, "save_steps": 2, "save_strategy": "steps", **changes}
            if stops:
                with pytest.raises(Killed):
                    train(folder, resume=resume, callbacks=stops, **settings)
                return None
            trainer = train(folder, resume=resume, **settings)
            trainer.save_model()
            return trainer

    return run


def stated(folder: Path) -> dict:
    return json.loads((folder / "privacy.json").read_text(encoding="utf-8"))


def isolation(folder: Path) -> str:
    return stated(folder)["validity_checks"]["numerical_isolation"]["status"]


def starts(folder: Path) -> list[int]:
    return [part.first_step for part in Trajectory.read(folder).parts]


def test_a_part_in_the_middle_is_stated(go_on, folder):
    go_on(3)
    go_on(6, loss_change=1e-8, version="1.1")
    go_on()
    assert starts(folder) == [0, 3, 6]
    assert Trajectory.read(folder).header["made_with"]["isolation"]["status"] == "bitwise"
    assert isolation(folder) == "bounded"
    assert [part["isolation"]["status"] for part in stated(folder)["parts"]] == ["bitwise", "bounded", "bitwise"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"- from step 3 on: cpu on {platform.machine()}, in 1 process, rows isolated up to" in card
    assert card.count("torch 1.1") == 1
    assert all(finding.holds is not False for finding in verify(folder, weights=False))


def test_the_card_from_the_log_alone_states_all_parts(go_on, folder, tmp_path):
    go_on(3)
    go_on(6, loss_change=1e-8)
    go_on()
    said = stated(folder)
    (folder / "privacy.json").unlink()
    (folder / "README.md").unlink()
    assert main(["card", str(folder)]) == 0
    assert stated(folder)["parts"] == said["parts"]
    assert isolation(folder) == "bounded"


def test_a_part_without_a_release_is_forgotten(go_on, folder, monkeypatch):
    """A kill may come between the entry of a part and its first release."""
    go_on(3)
    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryWriter, "append", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        go_on(4, loss_change=1e-8)
    assert [part["first_step"] for part in json.loads((folder / PARTS_FILE).read_text())["parts"]] == [3]
    assert starts(folder) == [0]
    go_on()
    assert not (folder / PARTS_FILE).exists()
    assert (isolation(folder), "parts" in stated(folder)) == ("bitwise", False)


def test_a_part_whose_first_record_was_torn_is_stated(go_on, folder):
    """What was torn may have been seen."""
    go_on(3)
    go_on(4, loss_change=1e-8, save_strategy="no")
    with open(folder / LOG_FILE, "r+b") as file:
        file.truncate((folder / LOG_FILE).stat().st_size - 3)
    assert starts(folder) == [0, 3]
    go_on()
    assert starts(folder) == [0, 3, 4]
    assert isolation(folder) == "bounded"
    assert Trajectory.read(folder).records[3].void


def test_a_run_that_goes_on_as_it_began_has_one_part(go_on, folder):
    go_on(3, loss_change=2e-8)
    go_on(5, loss_change=1e-8)
    go_on(loss_change=2e-8)
    assert not (folder / PARTS_FILE).exists()
    assert "parts" not in stated(folder)
    assert "Parts of the run" not in (folder / "README.md").read_text(encoding="utf-8")


def test_a_larger_bound_is_stated_without_further_words(go_on, folder):
    go_on(3, loss_change=1e-8)
    bound = Trajectory.read(folder).header["made_with"]["isolation"]["bound_in_clip_norms"]
    go_on(loss_change=3e-8)
    assert stated(folder)["validity_checks"]["numerical_isolation"]["bound_in_clip_norms"] > 2 * bound
    assert [part["first_step"] for part in stated(folder)["parts"]] == [0, 3]
    assert "Parts of the run" not in (folder / "README.md").read_text(encoding="utf-8")


def test_another_number_of_processes_is_a_part(go_on, folder, monkeypatch):
    go_on(3)
    log = Trajectory.read(folder)
    assert log.header["made_with"]["processes"] == 1
    header = {**log.header, "made_with": {**log.header["made_with"], "processes": 2}}
    writer = TrajectoryWriter.create(folder / LOG_FILE, header)
    for record in log.records:
        writer.append(record)
    writer.close()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    go_on()
    assert [part["processes"] for part in stated(folder)["parts"]] == [2, 1]


def test_a_log_of_an_earlier_version_goes_on(go_on, folder):
    """Its header knows no device and no number of processes."""
    go_on(3, save_strategy="no")
    log = Trajectory.read(folder)
    kept = {name: log.header["made_with"][name] for name in ("isolation", "versions")}
    writer = TrajectoryWriter.create(folder / LOG_FILE, {**log.header, "made_with": kept})
    for record in log.records:
        writer.append(record)
    writer.close()
    go_on(version="1.1")
    assert [(part["device"] is None, part["versions"]["torch"]) for part in stated(folder)["parts"]] == [
        (True, "1.0"),
        (False, "1.1"),
    ]
    assert all(finding.holds is not False for finding in verify(folder, weights=False))


def test_parts_travel_with_the_log(go_on, folder, tmp_path):
    go_on(3)
    go_on(loss_change=1e-8)
    assert (folder / "checkpoint-6" / PARTS_FILE).read_bytes() == (folder / PARTS_FILE).read_bytes()
    assert not (folder / "checkpoint-2" / PARTS_FILE).exists()
    assert isolation(folder / "checkpoint-6") == "bounded"
    copied = tmp_path / "copied"
    copied.mkdir()
    copy_log(folder, copied)
    refresh_card(copied, from_folder=folder)
    assert stated(copied)["parts"] == stated(folder)["parts"]
    copy_log(folder / "checkpoint-2", copied)
    assert not (copied / PARTS_FILE).exists()
    assert PARTS_FILE in STALE_PATTERNS


def test_parts_of_a_run_whose_log_was_deleted_are_deleted(go_on, folder):
    go_on(3)
    go_on(5, loss_change=1e-8)
    shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-4")
    (folder / LOG_FILE).unlink()
    go_on()
    assert not (folder / PARTS_FILE).exists()
    assert isolation(folder) == "bitwise"


def damage(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(b"\xff{"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "another step": lambda path: damage(path, lambda it: it["parts"][0].update(first_step=2)),
    "a later step": lambda path: damage(path, lambda it: it["parts"][0].update(first_step=5000)),
    "one part more": lambda path: damage(path, lambda it: it["parts"].append({**it["parts"][0], "first_step": 7})),
    "a part twice": lambda path: damage(path, lambda it: it["parts"].append(it["parts"][0])),
    "unknown isolation": lambda path: damage(path, lambda it: it["parts"][0]["isolation"].update(status="perfect")),
    "an unknown field": lambda path: damage(path, lambda it: it["parts"][0].update(surprise=1)),
    "a version": lambda path: damage(path, lambda it: it["parts"][0]["versions"].update(torch="1\x1b[2J")),
    "a better isolation": lambda path: damage(
        path, lambda it: it["parts"][0]["isolation"].update(status="bitwise", bound_in_clip_norms=0.0)
    ),
    "a lower bound": lambda path: damage(
        path, lambda it: it["parts"][0]["isolation"].update(bound_in_clip_norms=1e-12)
    ),
    "another version": lambda path: damage(path, lambda it: it["parts"][0]["versions"].update(torch="9.9")),
    "fewer processes": lambda path: damage(path, lambda it: it["parts"][0].update(processes=7)),
    "huge": lambda path: path.write_bytes(b" " * (1 << 23)),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.mark.parametrize("name", DAMAGE)
def test_parts_that_the_log_does_not_have_are_refused(name, go_on, folder, kept):
    if not kept.exists():
        go_on(3)
        go_on(loss_change=1e-8)
        shutil.copytree(folder, kept)
        shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    DAMAGE[name](folder / PARTS_FILE)
    (finding,) = (one for one in verify(folder, weights=False) if one.holds is False)
    assert finding.name == "log"
    torch.manual_seed(0)
    with pytest.raises(TrajectoryError) as caught:
        train(folder, resume=True, max_steps=STEPS)
    assert PARTS_FILE in str(caught.value) or "parts" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    for written in ("README.md", "privacy.json"):  # Written again, they would agree with what is there.
        (folder / written).unlink()
    assert main(["card", str(folder)]) != 0
    assert not (folder / "README.md").exists()


def test_an_isolation_that_is_better_than_the_parts_is_found(go_on, folder):
    go_on(3)
    go_on(loss_change=1e-8)
    path = folder / "privacy.json"
    damage(
        path, lambda it: it["validity_checks"]["numerical_isolation"].update(status="bitwise", bound_in_clip_norms=0.0)
    )
    assert "description" in [one.name for one in verify(folder, weights=False) if one.holds is False]
    damage(path, lambda it: it.pop("parts"))
    assert "description" in [one.name for one in verify(folder, weights=False) if one.holds is False]
