"""Fixtures of all tests."""

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tqdm.std import tqdm
from transformers import PreTrainedTokenizerFast

from hf_dpzo import ZOTrainingArguments
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian

from support.bases import base  # noqa: F401 - a fixture
from support.local_hub import hub  # noqa: F401 - a fixture
from support.models import word_tokenizer
from support.pictures import matplotlib_is_there
from support.recipes import models, workplace, write  # noqa: F401 - fixtures
from support.runs import short_args


# Tiny models gain nothing from threads, and two test runs at once would wait for each other's.
torch.set_num_threads(1)


def _own_progress_locks(kind: type[tqdm] = tqdm) -> None:
    """Give a forked child its own locks, since a killed one would never release the one that tqdm shares."""
    kind.set_lock(threading.RLock())
    for inner in kind.__subclasses__():
        _own_progress_locks(inner)


os.register_at_fork(after_in_child=_own_progress_locks)


def pytest_collection_finish() -> None:
    """Take what is loaded by now out of garbage collection: the Trainer collects in each run, at half of its cost."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _public_seed() -> None:
    """Weights of tiny models are the same in each test. Nothing in the library may depend on this."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory) -> Iterator[None]:
    """Runs remember their base models in a place of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Runs draw nothing, as where matplotlib is missing: a picture costs as much as the run."""
    with matplotlib_is_there(False):
        yield


@pytest.fixture
def pictures() -> Iterator[None]:
    """Runs draw pictures, as where matplotlib is installed."""
    with matplotlib_is_there(True):
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def make_args(tmp_path) -> Callable[..., ZOTrainingArguments]:
    """Arguments of a short private run, each in a folder of its own unless told otherwise."""
    numbers = itertools.count()

    def make(**changes) -> ZOTrainingArguments:
        return short_args(**{"output_dir": tmp_path / f"run{next(numbers)}", **changes})

    return make


@pytest.fixture
def sums(monkeypatch) -> list[list[int]]:
    """The sums that Gaussian noise would be added to, with everybody in each batch. There is no noise."""
    seen = []
    monkeypatch.setattr(DiscreteGaussian, "add", lambda one, values: seen.append(values) or values)
    monkeypatch.setattr(BernoulliSampler, "draw", lambda mask: np.ones(mask.size, dtype=bool))
    return seen
