"""Fixtures of all tests."""

import gc
import itertools

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_dpzo import ZOTrainingArguments
from hf_dpzo.privacy.noise import BernoulliMask, DiscreteGaussian


pytest.register_assert_rewrite("support")

from support.local_hub import hub  # noqa: E402, F401 - a fixture
from support.models import word_tokenizer  # noqa: E402
from support.recipes import workplace, write  # noqa: E402, F401 - fixtures


# Tiny models gain nothing from threads, and two test runs at once would wait for each other's.
torch.set_num_threads(1)


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
    return word_tokenizer()


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
    monkeypatch.setattr(BernoulliMask, "draw", lambda mask: np.ones(mask.size, dtype=bool))
    return seen
