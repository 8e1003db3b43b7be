"""A place with recipes, and what the command line says there."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from hf_dpzo.cli.main import main

from support.models import causal_lm, classifier, masked_lm


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model of each kind and a small labelled file. To be read alone."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in {"causal": causal_lm(), "classifier": classifier(), "masked": masked_lm()}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        writer.writerows([f"w{i % 40} w{i % 7}", i % 2, "a" if i % 4 else "b"] for i in range(80))
    return folder


@pytest.fixture
def workplace(models, tmp_path) -> Path:
    """The same folder, for one test."""
    return Path(shutil.copytree(models, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def write(workplace):
    def recipe(**changes) -> str:
        fields = {
            "model_name_or_path": str(workplace / "causal"),
            "data": str(workplace / "rows.csv"),
            "eval_rows": 10,
            "template": "{text} :",
            "label_words": {0: "bad", 1: "good"},
            "lora_target_modules": ["q_proj", "v_proj"],
            "lora_r": 2,
            "method": "dpzero",
            "noise_multiplier": 1,
            "target_delta": "1e-3",
            "expected_batch_size": 8,
            "max_steps": 2,
            "smoothing": "1e-2",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": str(workplace / "out"),
        }
        path = workplace / "recipe.yaml"
        path.write_text(
            yaml.safe_dump({name: value for name, value in {**fields, **changes}.items() if value != "absent"})
        )
        return str(path)

    return recipe


def table(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if "  " in line and not line.startswith("{")]
    return {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines}


def refused(capsys, *argv) -> str:
    assert main(argv) == 2
    # Progress bars of other libraries may come before it, and nothing after.
    message = capsys.readouterr().err.rpartition("hf-dpzo: ")[2]
    assert message.count("\n") == 1
    return message
