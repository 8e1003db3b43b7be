"""Where a model is to be had: what cards say of it, and what is said where there is none."""

import json
import shutil

import pytest
from huggingface_hub.utils import httpx

import hf_dpzo
from hf_dpzo.card import sources
from hf_dpzo.card.model_card import render_card
from hf_dpzo.card.sources import SourceError
from hf_dpzo.cli.main import main
from hf_dpzo.verification.verify import verify


def test_a_card_of_an_earlier_version_says_as_much_as_it_did(words, tmp_path):
    copied = shutil.copytree(words, tmp_path / "old")
    said = json.loads((copied / "privacy.json").read_text())
    del said["software"]
    (copied / "privacy.json").write_text(json.dumps(said))
    (copied / "README.md").write_text(str(render_card(said, [path.name for path in copied.iterdir()])))
    assert "github.com/hf-dpzo" not in (copied / "README.md").read_text()
    found = {finding.name: finding.holds for finding in verify(copied, weights=False)}
    assert found["card"] and found["description"] and found["claim"]
    # Written anew, it says more, and that holds too.
    assert main(["card", str(copied)]) == 0
    assert (
        "[`hf_dpzo`](https://github.com/hf-dpzo/hf_dpzo) (`pip install hf_dpzo`)" in (copied / "README.md").read_text()
    )
    assert all(finding.holds for finding in verify(copied, weights=False))


def test_code_of_a_card_that_was_not_filled_in_is_one_error(monkeypatch):
    def fail(*_, **__):
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(sources.HfApi, "model_info", fail)
    with pytest.raises(SourceError, match="it is no folder here, and not to be had from the Hub") as caught:
        hf_dpzo.load("FOLDER_OR_REPOSITORY")
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("name", ["out/nots", "/nowhere/model", "./nots", "~/nots", "a/b/c", "recipe.yaml"])
def test_a_mistyped_place_is_not_asked_for_on_the_hub(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(sources.HfApi, "model_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "notes").mkdir(parents=True)
    (tmp_path / "out" / "notes" / "trajectory.zo").touch()
    (tmp_path / "recipe.yaml").touch()
    assert main(["predict", name, "--text", "w1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hf-dpzo: model={name}: it is ") and "name the output_dir of a run" in said
    assert name != "out/nots" or "/out holds notes)." in said


def test_a_card_leaves_evaluation_figures_out_if_asked_to(words, tmp_path):
    copied = shutil.copytree(words, tmp_path / "run")
    before = (copied / "README.md").read_text()
    assert "eval_accuracy" in before and "evaluation figures" in before
    assert main(["card", str(copied), "--without-results"]) == 0
    for name in ("README.md", "privacy.json"):
        text = (copied / name).read_text()
        assert "eval_accuracy" not in text and "evaluation figures" not in text
    assert all(finding.holds for finding in verify(copied, weights=False))
