"""Tiny models, built from config classes, and tiny data."""

import gc
import itertools
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_dpzo import ZOTrainingArguments
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian


# Tiny models gain nothing from threads, and two test runs at once would wait for each other's.
torch.set_num_threads(1)

WORDS = [f"w{i}" for i in range(40)] + ["bad", "good", "very", ":"]


def pytest_collection_finish() -> None:
    """Take what is loaded by now out of garbage collection: the Trainer collects in each run, at half of its cost."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _public_seed():
    """Weights of tiny models are the same in each test. Nothing in the library may depend on this."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", "[EOS]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        eos_token="[EOS]",
        padding_side="left",
    )


def llama_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "num_labels": 2,
    }
    return LlamaConfig(**{**sizes, **changes})


def classifier(**changes) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(llama_config(**changes)).eval()


def causal_lm(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(**changes)).eval()


def one_layer(**changes) -> LlamaForSequenceClassification:
    """The classifier for tests that make many runs, to which a second layer adds nothing but time."""
    return classifier(num_hidden_layers=1, **changes)


def masked_lm() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    ).eval()


def with_lora(model: torch.nn.Module, task: TaskType = TaskType.SEQ_CLS) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"]))


def labelled_rows(count: int, seed: int = 0) -> Dataset:
    """Rows whose class is the half of the vocabulary that their first token comes from."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(4, 48) for _ in range(draw.randrange(3, 10))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(ids[0] >= 26)})
    return Dataset.from_list(rows)


def each_with_each(names: Iterable[str], kinds: Iterable[str]) -> pytest.MarkDecorator:
    """A sweep of `name`, `kind` and `lora` in which any two of their values meet.

    Directions know neither methods nor models, so that nothing hangs on all three.
    """
    cases = [(name, kind, (i + j) % 2 == 0) for i, name in enumerate(names) for j, kind in enumerate(kinds)]
    ids = [f"{name}-{kind}-{'lora' if lora else 'full'}" for name, kind, lora in cases]
    return pytest.mark.parametrize(("name", "kind", "lora"), cases, ids=ids)


def compare_along(walk, estimator, losses) -> torch.Tensor:
    """The coefficients `[rows, K]` of what `losses` returns at each stop of `walk`."""
    with walk:
        return estimator.coefficients(torch.stack([losses().double() for _ in walk], dim=1))


# Arguments of a short private run of `ZOTrainer`, for tests whose fixtures outlive those of one test.
SHORT_RUN = {
    "noise_multiplier": 1.0,
    "target_delta": 1e-4,
    "expected_batch_size": 8,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def few_public_rows() -> list[dict]:
    """The fewest rows for the isolation probe, in tests whose subject it is not. By default it makes up more."""
    return labelled_rows(2, seed=9).to_list()


@pytest.fixture
def make_args(tmp_path):
    """Arguments of a short private run, each in a folder of its own unless told otherwise."""
    numbers = itertools.count()

    def make(**changes) -> ZOTrainingArguments:
        settings = {
            "output_dir": str(tmp_path / f"run{next(numbers)}"),
            "method": "dpzero",
            "noise_multiplier": 1.0,
            "target_delta": 1e-4,
            "expected_batch_size": 8,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "smoothing": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        given = {**settings, **changes}
        return ZOTrainingArguments(**{name: value for name, value in given.items() if value != "absent"})

    return make


@pytest.fixture
def sums(monkeypatch) -> list[list[int]]:
    """The sums that Gaussian noise would be added to, with everybody in each batch. There is no noise."""
    seen = []
    monkeypatch.setattr(DiscreteGaussian, "add", lambda one, values: seen.append(values) or values)
    monkeypatch.setattr(BernoulliSampler, "draw", lambda mask: np.ones(mask.size, dtype=bool))
    return seen
