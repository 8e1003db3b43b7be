"""Runs of recipes on tiny models, which are asked and evaluated afterwards."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from hf_dpzo.cli.main import main


COMMON = {
    "eval_rows": "10",
    "template": "{text} :",
    "method": "dpzero",
    "noise_multiplier": "1",
    "target_delta": "1e-3",
    "expected_batch_size": "8",
    "max_steps": "1",
    "smoothing": "1e-2",
    "learning_rate": "1",
    "use_cpu": "true",
    "disable_tqdm": "true",
    "report_to": "none",
    "save_strategy": "no",
}
HEAD = {"task": "feature-classification", "classes": ["0", "1"], "layer": "1"}
WORDS = {"label_words": '{"0": "bad", "1": "good"}', "lora_target_modules": ["q_proj", "v_proj"]}
FULL = {"task": "sequence-classification", "classes": ["0", "1"], "adapter": "none"}


@pytest.fixture(scope="session")
def train(models, tmp_path_factory) -> Callable[..., Path]:
    """Trains a recipe in a folder of its own, and returns that of its model, `out`, beside which are its rows."""

    def run(base: str = "causal", **fields) -> Path:
        folder = tmp_path_factory.mktemp("run")
        (folder / "rows.csv").write_bytes((models / "rows.csv").read_bytes())
        written = {
            "model_name_or_path": str(models / base),
            "data": str(folder / "rows.csv"),
            "output_dir": str(folder / "out"),
            **COMMON,
            **fields,
        }
        (folder / "recipe.yaml").write_text(json.dumps({k: v for k, v in written.items() if v != "absent"}))
        assert main(["train", str(folder / "recipe.yaml")]) == 0
        return folder / "out"

    return run


@pytest.fixture(scope="session")
def words(train) -> Path:
    """The folder of an adapter that answers by label words. To be read alone."""
    return train(**WORDS)


@pytest.fixture(scope="session")
def activated(train) -> Path:
    """The folder of an activated adapter that answers by label words. To be read alone."""
    return train(adapter="activated-lora", **WORDS)


@pytest.fixture(scope="session")
def head(train) -> Path:
    """The folder of a head on features. To be read alone."""
    return train(**HEAD)


@pytest.fixture(scope="session")
def full(train) -> Path:
    """The folder of a classifier of which all parameters were trained. To be read alone."""
    return train(base="classifier", **FULL)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def writer(train) -> Path:
    """The folder of an adapter that writes. To be read alone."""
    return train(task="causal-lm", response="{source}", lora_target_modules=["q_proj"])
