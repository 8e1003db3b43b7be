"""Merged and exported models: opened by transformers and PEFT alone, and refused where they would be others."""

import json
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hf_dpzo
from hf_dpzo.cli.main import main
from hf_dpzo.use.saving import measure_drift

from support.models import causal_lm


WORDS = {"label_words": '{"0": "bad", "1": "good"}', "lora_target_modules": ["q_proj", "v_proj"]}


TOKENS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def run(models):
    def command(name: str, folder: Path, *flags: str, base: str = "causal") -> int:
        return main([name, str(folder), "--base", str(models / base), *flags])

    return command


def load(folder: Path, models: Path, base: str = "causal") -> torch.nn.Module:
    return hf_dpzo.load(folder, base=str(models / base), device="cpu").model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def test_a_merged_model_is_the_adapter_for_transformers_alone(run, words, models, tmp_path, capsys):
    assert run("merge", words, "--output", str(tmp_path / "merged")) == 0
    assert "largest change of a score" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert measure_drift([logits(load(words, models))], [logits(merged)]) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").padding_side == "left"
    claim = json.loads((words / "privacy.json").read_text())["claim"]
    assert f"({claim['epsilon']}, {claim['delta']})" in (tmp_path / "merged/README.md").read_text()
    assert json.loads((tmp_path / "merged/recipe.json").read_text())["label_words"] == ["bad", "good"]


@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_an_exported_adapter_opens_with_its_base(train, models, tmp_path, base):
    folder = train(dtype=base, max_length="16", padded_lengths=["16"], **WORDS)
    output = tmp_path / "exported"
    assert main(["export", str(folder), "--base", str(models / "causal"), "--output", str(output)]) == 0
    own = logits(load(folder, models))
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        opened = kind.from_pretrained(output, dtype=torch.float32)
        assert measure_drift([own], [logits(opened)]) < (0.05 if base == "bfloat16" else 1e-5)
    written = pipeline("text-generation", model=str(output), device="cpu")("w1 w2", max_new_tokens=2)
    assert written[0]["generated_text"].startswith("w1 w2")


@pytest.mark.parametrize("command", ["merge", "export"])
def test_what_a_merged_and_an_exported_folder_say_of_their_use_runs(run, writer, tmp_path, capsys, command):
    output = tmp_path / "new"
    assert run(command, writer, "--output", str(output)) == 0
    card = ModelCard.load(output / "README.md")
    library = {"merge": "transformers", "export": "peft"}[command]
    assert (card.data.library_name, card.data.pipeline_tag) == (library, "text-generation")
    assert "Its base model is `causal`." in card.text and str(tmp_path) not in card.text
    code = card.text.partition("```python\n")[2].partition("\n```")[0].replace("FOLDER_OR_REPOSITORY", str(output))
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out


def test_an_exported_head_opens_with_its_base_and_names_its_classes(run, head, models, tmp_path):
    assert run("export", head, "--output", str(tmp_path / "exported")) == 0
    opened = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "exported"))
    assert torch.equal(logits(opened), logits(load(head, models)))
    assert opened.config.id2label == {0: "0", 1: "1"}
    (said,) = pipeline("text-classification", model=str(tmp_path / "exported"), device="cpu")(["w1 w2 :"])
    expected = hf_dpzo.load(head, base=str(models / "causal"), device="cpu").predict("w1 w2")
    assert (said["label"], said["score"]) == (expected["label"], pytest.approx(expected["score"], abs=1e-5))


def test_an_exported_model_of_all_parameters_is_a_plain_one(run, full, models, tmp_path):
    assert run("export", full, "--output", str(tmp_path / "exported"), base="classifier") == 0
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(opened), logits(load(full, models, "classifier")))
    assert opened.config.id2label == {0: "0", 1: "1"}


def test_an_adapter_keeps_the_names_of_its_classes(run, train, tmp_path):
    names = '{"0": "no", "1": "yes"}'
    folder = train(base="classifier", task="sequence-classification", label_words=names, lora_target_modules=["q_proj"])
    assert run("merge", folder, "--output", str(tmp_path / "merged"), base="classifier") == 0
    (said,) = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")(["w1 w2 :"])
    assert said["label"] in ("no", "yes")


@pytest.fixture(scope="module")
def tied(train, models) -> Path:
    """The folder of an adapter on embeddings that the output layer shares. To be read alone."""
    torch.manual_seed(0)
    causal_lm(tie_word_embeddings=True, initializer_range=0.3).save_pretrained(models / "tied")
    AutoTokenizer.from_pretrained(models / "causal").save_pretrained(models / "tied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that merging will be a problem.
        return train(base="tied", **{**WORDS, "lora_target_modules": ["embed_tokens", "q_proj"]})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merged_model_that_would_be_another_one_is_refused_and_leaves_nothing(run, tied, tmp_path, capsys):
    assert run("merge", tied, "--output", str(tmp_path / "merged"), base="tied") == 2
    assert "tied embeddings: use it by PEFT" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert run("export", tied, "--output", str(tmp_path / "exported"), base="tied") == 0


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("merge", ("--output", "out"), "nothing to merge; use hf-dpzo export"),
        ("merge", ("--output", "."), "output=.: it is there already"),
        ("export", (), "output: name a new folder, or a file by --gguf"),
        ("export", ("--gguf", "out.gguf"), "llama.cpp's convert_hf_to_gguf.py is not on the PATH"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_sentence(
    run, head, words, tmp_path, monkeypatch, capsys, command, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "mine.txt").write_text("mine")
    folder = head if "nothing to merge" in message else words
    assert run(command, folder, *flags) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["mine.txt"]


def test_llama_cpps_converter_is_given_the_merged_model(run, words, models, tmp_path, monkeypatch):
    """A stand-in for the converter: it lists what it finds, in place of converting it."""
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import os, sys\nopen(sys.argv[3], 'w').write(' '.join(sorted(os.listdir(sys.argv[1]))))\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert run("export", words, "--gguf", str(tmp_path / "model.gguf")) == 0
    found = (tmp_path / "model.gguf").read_text().split()
    assert "model.safetensors" in found and "adapter_config.json" not in found
