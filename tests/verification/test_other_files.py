"""Files that no check opens: code fails, strange weights are named, and honest folders pass."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from hf_dpzo.cli.main import main
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.verification.finding import Finding
from hf_dpzo.verification.verify import verify


@pytest.fixture
def folder(runs, copied) -> Path:
    return copied(runs("all parameters"))


def find_others(folder: Path | str) -> Finding:
    (found,) = (one for one in verify(folder, weights=False) if one.name == "other files")
    return found


def write(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")


def save_zeros(folder: Path, name: str) -> None:
    """Save other weights of the same form into the file `name`."""
    write(folder, name)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value * 0 for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


def cut_log(folder: Path, steps: int) -> bytes:
    log = Trajectory.read(folder)
    data = (folder / LOG_FILE).read_bytes()
    return data[: len(data) - (len(log.records) - steps) * log.layout.record_size]


def test_a_pickle_of_arguments_is_called_one(folder):
    """No loader of a model opens it, but whoever is curious may, and it runs what it holds."""
    found = find_others(folder)
    assert found.holds and "training_args.bin is a pickle, which runs what it holds" in found.detail
    for path in folder.rglob("training_args.bin"):
        path.unlink()
    assert "pickle" not in find_others(folder).detail


HARMLESS = [
    "a.pdf",
    "rows.csv",
    "curve.SVG",
    "train.log",
    "notes.yaml",
    "photo.jpg",
    "LICENSE.txt",
    "NOTICE",
    ".DS_Store",
]


@pytest.mark.parametrize("name", [*HARMLESS, "runs/now/events.out.tfevents.1.host.2.0", ".git/hooks/pre-commit"])
def test_files_that_nothing_is_loaded_from_pass(name, folder):
    write(folder, name)
    found = find_others(folder)
    assert found.holds is True
    assert ("/" in name) or name in found.detail


CODE = [
    "custom_generate/generate.py",
    "sub/modeling_x.py",
    "a/b/c.so",
    ".git/x.py",
    "checkpoint-1/x.PY",
    "build/kernel.cu",
]


@pytest.mark.parametrize("name", [*CODE, "x.py", "x.unknown", "weights", "x.bin", "X.Safetensors"])
def test_code_anywhere_and_unknown_kinds_beside_the_model_fail(name, folder):
    write(folder, name)
    found = find_others(folder)
    assert found.holds is False and name in found.detail


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_a_tokenizer_that_asks_for_code_fails(name, folder):
    (folder / name).write_text('{"auto_map": {"AutoTokenizer": ["someone/else--code.Tokenizer", null]}}')
    found = find_others(folder)
    assert found.holds is False and name in found.detail
    (folder / name).write_text("no JSON")
    assert find_others(folder).holds is True


WEIGHTS = [
    "other/model.safetensors",
    ".git/model.safetensors",
    "a/b/adapter_config.json",
    "gguf/x.gguf",
    "x/m.index.json",
]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_in_a_subfolder_are_named(name, folder):
    write(folder, name)
    found = find_others(folder)
    assert found.holds is None and f"{Path(name).parent}/ (with weights)" in found.detail


def test_an_unknown_kind_in_a_subfolder_is_named(folder):
    write(folder, "sub/.safetensors")
    found = find_others(folder)
    assert found.holds is None and "sub/.safetensors" in found.detail


@pytest.mark.parametrize("place", ["sub", "a/b/sub"])
def test_a_link_to_a_folder_elsewhere_is_named(place, folder, base, tmp_path):
    save_zeros(folder, "away/model.safetensors")
    (folder / "away").rename(tmp_path / "elsewhere")
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).symlink_to(tmp_path / "elsewhere")
    found = find_others(folder)
    assert found.holds is None and f"{place}/ (a link)" in found.detail
    assert main(["verify", str(folder), "--base", str(base)]) == 3


def test_checkpoints_of_the_run_pass(folder):
    save_zeros(folder, "checkpoint-5/model.safetensors")
    (folder / "checkpoint-5" / LOG_FILE).write_bytes(cut_log(folder, 5))
    write(folder, "checkpoint-5/optimizer.pt")
    (folder / "best").symlink_to("checkpoint-5")
    found = find_others(folder)
    assert found.holds is True and "checkpoint-5/ (of this run)" in found.detail


FAKES = {
    "no log": lambda folder, log: None,
    "another log": lambda folder, log: log.write_bytes(cut_log(folder, 5)[:-1] + b"!"),
    "a longer log": lambda folder, log: log.write_bytes((folder / LOG_FILE).read_bytes() + b"more"),
    "an empty log": lambda folder, log: log.write_bytes(b""),
    "a folder": lambda folder, log: log.mkdir(),
    "a pipe": lambda folder, log: os.mkfifo(log),
}


@pytest.mark.parametrize("kind", FAKES)
def test_a_folder_with_the_name_of_a_checkpoint_alone_is_no_checkpoint(kind, folder):
    save_zeros(folder, "checkpoint-1/model.safetensors")
    FAKES[kind](folder, folder / "checkpoint-1" / LOG_FILE)
    found = find_others(folder)
    assert found.holds is None and "checkpoint-1/ (with weights)" in found.detail


@pytest.mark.parametrize("is_own", [True, False])
def test_checkpoints_on_the_hub_are_compared_too(is_own, folder, hub):
    save_zeros(folder, "checkpoint-5/model.safetensors")
    write(folder, "checkpoint-5/optimizer.pt")
    if is_own:
        (folder / "checkpoint-5" / LOG_FILE).write_bytes(cut_log(folder, 5))
    HfApi().create_repo("me/m")
    shutil.rmtree(folder / "runs", ignore_errors=True)
    HfApi().upload_folder(repo_id="me/m", folder_path=folder)
    assert find_others("me/m").holds is (True if is_own else None)
