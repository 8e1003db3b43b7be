"""The examples run on tiny models, as their first lines say."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForTokenClassification

from hf_dpzo import Trajectory

from support.models import llama_config
from support.paths import ROOT


EXAMPLES = sorted(ROOT.glob("examples/*.py"))
CHAT = "{% for message in messages %}{{ message.role }} {{ message.content }} [EOS] {% endfor %}"
# What makes each of them short. Flags that stand twice have the last value.
SHORT = [
    *("--max_steps", "2", "--expected_batch_size", "8", "--target_delta", "1e-3"),
    *("--report_to", "none", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"),
]

# Every answer is generated at each of its points.
FEW_POINTS = {"reward": ["--num_directions", "2"]}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """The files and models that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    texts = [f"w{i % 40} w{i % 7}" for i in range(40)]
    rows = [f"u{i % 20},{text},{i % 2}" for i, text in enumerate(texts)]
    for name in ("train.csv", "test.csv", "messages.csv"):
        (folder / name).write_text("\n".join(["user,text,label", *rows]) + "\n", encoding="utf-8")
    lines = {
        "words": [{"words": text.split(), "tags": ["O", "PERSON"]} for text in texts],
        "chats": [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "good"}]}
            for text in texts
        ],
        "prompts": [{"prompt": text} for text in texts],
    }
    for name, kind in (
        ("train.jsonl", "words"),
        ("test.jsonl", "words"),
        ("chats.jsonl", "chats"),
        ("public.jsonl", "chats"),
        ("prompts.jsonl", "prompts"),
    ):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines[kind]), encoding="utf-8")
    torch.manual_seed(0)
    tagger = folder / "tagger"
    LlamaForTokenClassification(llama_config(num_labels=3)).save_pretrained(tagger)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tagger / name).write_bytes((models / "causal" / name).read_bytes())
    (models / "causal" / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return folder


def read_command(path) -> list[str]:
    """Return the flags of the command that an example begins with."""
    (command,) = re.findall(rf"python examples/{path.name}((?:.*\\\n)*.*)\n", path.read_text(encoding="utf-8"))
    return shlex.split(command.replace("\\\n", " "))


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_and_saves_by_its_own_command(path, files, models, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    model = {"text_classification": models / "classifier", "token_classification": files / "tagger"}
    flags = [*read_command(path), *SHORT, *FEW_POINTS.get(path.stem, []), "--output_dir", str(tmp_path)]
    flags += ["--model_name_or_path", str(model.get(path.stem, models / "causal"))]
    load(path).main(flags)
    log = Trajectory.read(tmp_path)
    assert len(log.records) == 2
    assert log.header["rows"]["units"] == (20 if path.stem == "users" else 40)
    assert (tmp_path / "README.md").is_file()
    assert json.loads((tmp_path / "privacy.json").read_text())["claim"]["epsilon"] <= 8


def test_each_example_is_listed():
    listed = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in listed for path in EXAMPLES)


@pytest.mark.slow
def test_two_processes_share_the_batches_of_an_example(files, models, tmp_path):
    path = ROOT / "examples/text_classification.py"
    launcher = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch = [sys.executable, "-W", "ignore", "-m", *launcher.split(), "--dynamo_backend", "no", str(path)]
    flags = [*read_command(path), *SHORT, "--output_dir", str(tmp_path)]
    flags += ["--model_name_or_path", str(models / "classifier")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *flags], cwd=files, check=True, timeout=300, env=environment)
    log = Trajectory.read(tmp_path)
    assert (len(log.records), log.header["made_with"]["processes"]) == (2, 2)
