"""A log's base model is downloaded only after its size was said, and above a limit only where that was allowed."""

import pytest
from huggingface_hub import constants, create_repo
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_dpzo import ZOTrainer, from_trajectory
from hf_dpzo.cli.main import main
from hf_dpzo.trajectory.base_files import BaseFiles, DownloadError
from hf_dpzo.verification.verify import verify

from support.rows import labelled_rows
from support.runs import short_args


@pytest.fixture
def elsewhere(hub, base, tokenizer, tmp_path, monkeypatch):
    """The folder of a run on a base model of the Hub, on a machine that has not downloaded it."""
    create_repo("tester/base")
    for path in base.iterdir():
        hub.edit("tester/base", path.name, path.read_bytes())
    trainer = ZOTrainer(
        model=AutoModelForSequenceClassification.from_pretrained("tester/base"),
        args=short_args(tmp_path / "out", max_steps=20),
        train_dataset=labelled_rows(40),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.requests.clear()
    return tmp_path / "out"


def downloads(hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET") and request.endswith(".safetensors")]


def test_the_size_is_said_before_the_download(hub, elsewhere, base, capsys):
    said = []

    def announce(sentence: str) -> None:
        assert not downloads(hub)
        said.append(sentence)

    found = {one.name: one.holds for one in verify(elsewhere, announce=announce)}
    assert found["weights"] is True and len(downloads(hub)) == 1
    size = (base / "model.safetensors").stat().st_size
    assert said == [f"base=tester/base: {size} bytes are downloaded from the Hub, because the log names it."]
    assert main(["verify", str(elsewhere)]) == 0  # It is there now.
    assert "downloaded from the Hub" not in capsys.readouterr().err


def test_a_base_above_the_limit_is_not_downloaded(hub, elsewhere, capsys):
    found = {one.name: one for one in verify(elsewhere, max_download=1000)}
    assert found["base model"].holds is None and "--max-download" in found["base model"].detail
    assert main(["verify", str(elsewhere), "--max-download", "0.000001"]) == 3
    assert "allow more with --max-download" in capsys.readouterr().out
    with pytest.raises(DownloadError, match="max_download"):
        from_trajectory(elsewhere, max_download=1000)
    assert not downloads(hub)


def test_a_base_that_the_reader_names_is_not_asked_for(hub, elsewhere, base):
    found = {one.name: one.holds for one in verify(elsewhere, base=str(base), max_download=0)}
    assert found["weights"] is True and not downloads(hub)


def test_a_size_that_the_hub_does_not_tell_is_above_every_limit(hub, elsewhere, monkeypatch):
    info = hub._info

    def without_sizes(asked):
        headers, content = info(asked)
        for file in content["siblings"]:
            file.pop("size", None)
        return headers, content

    monkeypatch.setattr(hub, "_info", without_sizes)
    found = {one.name: one for one in verify(elsewhere)}
    assert "of a size that the Hub does not tell" in found["base model"].detail and not downloads(hub)


def test_without_a_network_what_was_downloaded_before_does(hub, elsewhere, monkeypatch):
    assert verify(elsewhere)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    found = {one.name: one.holds for one in verify(elsewhere)}
    assert found["weights"] is True and not hub.requests


@pytest.mark.parametrize("limit", ["nan", "inf", "-1"])
def test_a_limit_that_is_no_size_is_refused(tmp_path, limit, capsys):
    assert main(["verify", str(tmp_path), f"--max-download={limit}"]) == 2
    assert "max_download=" in capsys.readouterr().err


def test_shards_count_together_and_pickles_not_at_all(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "pytorch_model.bin", "config.json"):
        (tmp_path / name).write_bytes(b"x" * 10)
    assert BaseFiles.find(str(tmp_path), {"revision": "main"}).file_bytes == 20
