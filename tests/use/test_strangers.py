"""A folder from a stranger: it runs no code, opens no file elsewhere, and what was changed in it is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import hf_dpzo
from hf_dpzo.card.sources import SourceError
from hf_dpzo.io.files import LinkError
from hf_dpzo.trajectory.header import TrajectoryError


@pytest.fixture
def copied(words, tmp_path) -> Path:
    return Path(shutil.copytree(words, tmp_path / "copy"))


@pytest.fixture
def load(models):
    return lambda folder: hf_dpzo.load(folder, base=str(models / "causal"), device="cpu")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> None:
    """A machine that did not train the model."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]}, "auto_map names code"),
        ("vocab_file", "/etc/passwd", "'vocab_file' names a file"),
        ("merges_file", "../secrets.txt", "'merges_file' names a file"),
        ("anything", "/etc/hostname", "'anything' names a file"),
    ],
)
def test_a_tokenizer_that_names_code_or_files_is_refused(copied, load, name, value, message):
    (copied / "evil.py").write_text("raise SystemExit('it ran')")
    change(copied / "tokenizer_config.json", **{name: value})
    with pytest.raises(SourceError, match=message):
        load(copied)


def test_a_link_in_the_place_of_a_tokenizer_is_refused(copied, load, tmp_path):
    (copied / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (copied / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(LinkError, match="it is a link"):
        load(copied)


def test_where_it_was_trained_its_base_is_known(words, models):
    asked = hf_dpzo.load(words, device="cpu")
    assert asked.predict("w1") == hf_dpzo.load(words, base=str(models / "causal"), device="cpu").predict("w1")


def test_a_base_model_is_opened_only_where_the_user_says(copied, models, elsewhere):
    """The adapter's own configuration, which PEFT would follow, and the folder that the log names are not."""
    change(copied / "adapter_config.json", base_model_name_or_path="/etc")
    with pytest.raises(TrajectoryError, match="name where it is here, as base"):
        hf_dpzo.load(copied)
    assert hf_dpzo.load(copied, base=str(models / "causal"), device="cpu").predict("w1")["label"] in ("0", "1")


@pytest.mark.parametrize("fault", ["missing", "shape", "added", "damaged"])
def test_other_weights_than_a_run_saves_are_refused(copied, load, fault):
    path = copied / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    if fault == "missing":
        del tensors[first]
    elif fault == "shape":
        tensors[first] = tensors[first][:1].contiguous()
    elif fault == "added":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(1)
    save_file(tensors, path)
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SourceError, match=r"other tensors|cannot be read"):
        load(copied)


def test_the_recipe_is_that_of_the_log_whatever_stands_beside_it(copied, load):
    change(copied / "recipe.json", template="{text} very bad", classes=["1", "0"])
    assert load(copied).recipe.labels == ("0", "1")


def test_a_folder_without_a_log_is_refused(copied, load):
    (copied / "trajectory.zo").unlink()
    with pytest.raises(SourceError, match=r"trajectory\.zo: there is no such file"):
        load(copied)
