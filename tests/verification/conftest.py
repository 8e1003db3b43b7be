"""What the tests of verification share: a base model, honest runs on it, and copies to tamper with."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, TaskType
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_dpzo import ZOTrainer, ZOTrainingArguments, seeded_peft_model
from hf_dpzo.recipe.tasks.metrics import compute_accuracy

from support.models import classifier
from support.pictures import matplotlib_is_there
from support.published import STEPS
from support.rows import labelled_rows
from support.runs import SHORT_RUN
from support.sweeps import slow


@pytest.fixture(scope="package")
def base(tmp_path_factory, tokenizer) -> Path:
    """A base model in a folder, and another one like it."""
    folder = tmp_path_factory.mktemp("base")
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        classifier().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "one"


@pytest.fixture(scope="package")
def train(base, tokenizer, tmp_path_factory):
    """Trains on a base model from a folder, and saves."""

    def run(*, lora: bool, adapter: PeftConfig | None = None, **changes) -> Path:
        settings = {
            "output_dir": str(tmp_path_factory.mktemp("run") / "out"),
            **SHORT_RUN,
            "max_steps": STEPS,
        }
        given = {name: value for name, value in {**settings, **changes}.items() if value is not None}
        model = AutoModelForSequenceClassification.from_pretrained(base)
        if lora:
            config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"])
            model = seeded_peft_model(model, adapter or config, seed=1)
        trainer = ZOTrainer(
            model=model,
            args=ZOTrainingArguments(**given),
            train_dataset=labelled_rows(40),
            eval_dataset=labelled_rows(8, seed=1),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_accuracy,
        )
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        return Path(given["output_dir"])

    return run


@pytest.fixture(scope="package")
def runs(train) -> Callable[[str], Path]:
    """What runs saved that change an adapter, or all parameters. To be read alone."""

    @functools.cache
    def run(kind: str) -> Path:
        with matplotlib_is_there(True):
            return train(lora=kind == "adapter")

    return run


@pytest.fixture(scope="package", params=["adapter", *slow("all parameters")])
def honest(request, runs) -> Path:
    """Where it hardly matters what was trained."""
    return runs(request.param)


@pytest.fixture(scope="package", params=["adapter", "all parameters"])
def either(request, runs) -> Path:
    return runs(request.param)


@pytest.fixture(scope="package")
def adapter(runs) -> Path:
    return runs("adapter")


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], Path]:
    """Makes a copy, to tamper with."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.lock")))

    return copy


@pytest.fixture
def copy(honest, copied) -> Path:
    return copied(honest)


@pytest.fixture
def copy_of_either(either, copied) -> Path:
    return copied(either)
