"""What a checkpoint is spared, beside its weights: a picture, hashing twice, reading what stays the same."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

import hf_dpzo.card.model_card
import hf_dpzo.trainer.publishing
import hf_dpzo.trainer.resumable
from hf_dpzo import ZOTrainer
from hf_dpzo.card.declarations import _versions
from hf_dpzo.card.model_card import TEMPLATE, _template
from hf_dpzo.card.repository import refresh_card
from hf_dpzo.cli.main import main
from hf_dpzo.models.seal import BrokenSealError
from hf_dpzo.plots import PICTURE_FILE
from hf_dpzo.trajectory.checkpoints import MARK_FILE
from hf_dpzo.verification.verify import verify

from support.models import one_layer, with_lora
from support.rows import few_public_rows, labelled_rows


pytestmark = pytest.mark.usefixtures("pictures")
STEPS = 3
# Packages whose versions nobody else asks for.
OURS = ("dp-accounting", "opendp")


class AsksForACard(Trainer):
    """As TRL's trainers, it has a card written before each checkpoint."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.create_model_card(model_name="model")
        super()._save_checkpoint(model, trial)


class JoinedTrainer(ZOTrainer, AsksForACard):
    """The private Trainer, joined with one of these."""


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    one_layer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make(make_args, base):
    def trainer(kind: type[ZOTrainer] = ZOTrainer, callbacks: list | None = None, **changes) -> ZOTrainer:
        torch.manual_seed(0)
        settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
        return kind(
            model=with_lora(one_layer().from_pretrained(base)),
            args=make_args(**{**settings, **changes}),
            train_dataset=labelled_rows(40),
            probe_rows=few_public_rows(),
            callbacks=callbacks,
        )

    return trainer


@pytest.fixture
def drawn(monkeypatch) -> list[Path]:
    """Where pictures would be drawn."""
    places = []
    monkeypatch.setattr(hf_dpzo.card.model_card, "draw_training", places.append)
    return places


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The fingerprints of weights that were taken for a card or a mark."""
    found, inner = [], hf_dpzo.trainer.resumable.fingerprint_values

    def noted(tensors):
        found.append(inner(tensors))
        return found[-1]

    for module in (hf_dpzo.trainer.resumable, hf_dpzo.trainer.publishing):
        monkeypatch.setattr(module, "fingerprint_values", noted)
    return found


def checkpoints(trainer: ZOTrainer) -> list[Path]:
    return [Path(trainer.args.output_dir) / f"checkpoint-{step}" for step in range(1, STEPS + 1)]


def stated_and_marked(checkpoint: Path) -> tuple[str, str]:
    """The fingerprint of its weights in the card's statement, and in the mark."""
    said = json.loads((checkpoint / "privacy.json").read_text())
    return said["reproducibility"]["weights"]["sha256"], json.loads((checkpoint / MARK_FILE).read_text())["weights"]


def shows_picture(folder: Path) -> bool:
    """Whether it has the picture; the card names it then, and not otherwise."""
    named = f"]({PICTURE_FILE})" in (folder / "README.md").read_text()
    assert named == (folder / PICTURE_FILE).is_file()
    return named


@pytest.mark.parametrize("kind", [ZOTrainer, JoinedTrainer])
def test_checkpoints_have_no_picture_and_verify_without(make, drawn, base, kind):
    trainer = make(kind)
    trainer.train()
    assert drawn == []
    for folder in checkpoints(trainer):
        assert not shows_picture(folder)
        assert all(finding.holds for finding in verify(folder, base=str(base)))


@pytest.mark.parametrize("kind", [ZOTrainer, JoinedTrainer])
def test_saved_models_have_their_picture(make, tmp_path, kind):
    trainer = make(kind)
    trainer.train()
    for save in (trainer.save_model, lambda: trainer.save_model(str(tmp_path / "saved")), trainer.create_model_card):
        save()
    assert shows_picture(Path(trainer.args.output_dir)) and shows_picture(tmp_path / "saved")


def test_a_model_that_is_saved_while_training_has_its_picture(make, tmp_path):
    class Saves(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            trainer.save_model(str(tmp_path / f"saved{state.global_step}"))

    trainer = make(callbacks=[Saves()], save_steps=2)
    trainer.train()
    assert shows_picture(tmp_path / "saved2") and not shows_picture(checkpoints(trainer)[1])


def test_the_command_draws_the_picture_of_a_checkpoint(make, base):
    trainer = make()
    trainer.train()
    folder = checkpoints(trainer)[1]
    before = (folder / "privacy.json").read_bytes()
    assert main(["card", str(folder)]) == 0
    assert shows_picture(folder)
    assert (folder / "privacy.json").read_bytes() == before
    assert all(finding.holds for finding in verify(folder, base=str(base)))


def test_a_picture_that_lay_in_the_folder_of_a_checkpoint_goes(make):
    trainer = make()
    folder = checkpoints(trainer)[1]
    folder.mkdir(parents=True)
    (folder / PICTURE_FILE).write_bytes(b"of another run")
    trainer.train()
    assert not shows_picture(folder)


@pytest.mark.parametrize("only_log", [False, True])
def test_every_commit_has_the_picture(hub, make, only_log):
    class OneAfterAnother(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            trainer._finish_current_push()

    huggingface_hub.create_repo("tester/model")
    options = {"push_to_hub": True, "hub_model_id": "tester/model", "push_trajectory": only_log}
    trainer = make(callbacks=[OneAfterAnother()], **options)
    trainer.train()
    pushed = [one.files for one in hub.commits("tester/model") if "privacy.json" in one.files]
    assert len(pushed) == STEPS
    for files in pushed:
        assert PICTURE_FILE in files and f"]({PICTURE_FILE})".encode() in files["README.md"]
    assert not any(shows_picture(folder) for folder in checkpoints(trainer))


def test_template_and_versions_are_read_once_by_a_process(make, monkeypatch):
    compile_kernel, asked = [], []
    compile_, version, text = jinja2.Environment.compile, importlib.metadata.version, TEMPLATE.read_text()

    def noted(environment, source, *given, **named):
        compile_kernel.append(source)
        return compile_(environment, source, *given, **named)

    def looked_up(name):
        asked.append(name)
        return version(name)

    monkeypatch.setattr(jinja2.Environment, "compile", noted)
    monkeypatch.setattr(importlib.metadata, "version", looked_up)
    _template.cache_clear()
    _versions.cache_clear()
    trainer = make()
    trainer.train()
    trainer.save_model()
    refresh_card(checkpoints(trainer)[0])
    assert compile_kernel.count(text) == 1
    assert [asked.count(name) for name in OURS] == [1] * len(OURS)


@pytest.mark.parametrize("kind", [ZOTrainer, JoinedTrainer])
def test_the_weights_of_a_checkpoint_are_hashed_once(make, hashed, kind):
    make(kind, save_strategy="no").train()
    without = len(hashed)
    trainer = make(kind)
    trainer.train()
    assert len(hashed) == 2 * without + STEPS
    for folder in checkpoints(trainer):
        stated, marked = stated_and_marked(folder)
        assert stated == marked and hashed.count(stated) >= 1


def test_weights_that_move_after_a_checkpoint_end_the_run_and_are_not_saved(make):
    """Also where whoever moves them goes around all that counts changes of a tensor."""

    class Moves(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            next(p for p in model.parameters() if p.requires_grad).data.numpy()[:] += 1

    trainer = make(callbacks=[Moves()], save_steps=STEPS)
    with pytest.raises(BrokenSealError):
        trainer.train()
    with pytest.raises(ValueError, match="model: it is another one than training left, or was changed since"):
        trainer.save_model()
    stated, marked = stated_and_marked(checkpoints(trainer)[-1])
    assert stated == marked


def test_weights_that_were_changed_after_the_last_checkpoint_are_not_saved(make, tmp_path):
    trainer = make()
    trainer.train()
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).add_(1e-3)
    with pytest.raises(ValueError, match="model: it is another one than training left, or was changed since"):
        trainer.save_model(str(tmp_path / "other"))


def test_a_checkpoint_of_other_weights_than_the_log_leads_to_is_not_written(make):
    """As where a subclass saves an average in place of the trained weights."""

    class SavesOthers(ZOTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            next(p for p in self.model.parameters() if p.requires_grad).data.add_(1)
            super().save_model(output_dir, _internal_call)

    trainer = make(SavesOthers)
    with pytest.raises(ValueError, match="model: it is another one than training left, or was changed since"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).rglob("adapter_model.safetensors"))


def test_a_checkpoint_whose_weights_were_exchanged_is_refused(make):
    class Stops(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make(callbacks=[Stops()])
    trainer.train()
    (weights,) = Path(trainer.args.output_dir).glob("checkpoint-2/*model.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    again = make(output_dir=trainer.args.output_dir)
    with pytest.raises(ValueError, match="its weights are not those that were saved"):
        again.train(resume_from_checkpoint=True)


def test_all_of_a_checkpoint_is_on_disk_before_its_mark(make, monkeypatch):
    synced, sync = [], os.fsync

    def noted(handle):
        synced.append(os.fstat(handle).st_ino)
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    trainer = make(save_steps=STEPS)
    trainer.train()
    folder = checkpoints(trainer)[-1]
    mark = synced.index((folder / MARK_FILE).stat().st_ino)
    others = {path.name: path.stat().st_ino for path in folder.iterdir() if path.name != MARK_FILE}
    assert {"README.md", "privacy.json", "trajectory.zo", "adapter_model.safetensors"} <= set(others)
    for name, inode in {**others, "the folder": folder.parent.stat().st_ino}.items():
        assert inode in synced[:mark], name
    assert folder.stat().st_ino in synced[mark:]
