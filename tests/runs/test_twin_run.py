"""The whole program on a data set and on its neighbour: all that they leave behind is the same, byte for byte.

Sampling, time and the released integers are frozen, the integers at the same values in both runs. So whatever differs
did not come through the door. What came to the door differs by at most the sensitivity.
"""

import json
import logging
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import ZOTrainer
from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian
from hf_dpzo.recipe.tasks.metrics import compute_accuracy

from support.models import classifier, one_layer, with_lora
from support.rows import labelled_rows


pytestmark = pytest.mark.usefixtures("pictures")
ROWS, STEPS = 16, 6
ORDINARY = {"input_ids": [9, 8, 7, 6], "attention_mask": [1, 1, 1, 1], "labels": 0}
# What stands in the place of one ordinary row in the neighbour.
NEIGHBOURS = {
    "another row": {"input_ids": [30, 31], "attention_mask": [1, 1], "labels": 1},
    "a long row": {"input_ids": [33] * 60, "attention_mask": [1] * 60, "labels": 1},
    "a wrong class": {"input_ids": [30, 31], "attention_mask": [1, 1], "labels": 9},
    "a wrong token": {"input_ids": [30, 10**6], "attention_mask": [1, 1], "labels": 1},
    "no tokens": {"input_ids": [], "attention_mask": [], "labels": 1},
    "not a row": None,
}


class Witness(TrainerCallback):
    """Writes down what callbacks see: the order of events, the state, and where the global generators are."""

    def __init__(self) -> None:
        self.seen = []

    def on_event(self, event, args, state, control, **kwargs) -> None:
        generators = (torch.get_rng_state().sum().item(), np.random.get_state()[2], hash(random.getstate()))
        self.seen.append((event, json.dumps(state.log_history), state.global_step, repr(control), generators))


def _told(event):
    return lambda self, args, state, control, **kwargs: self.on_event(event, args, state, control)


for _event in (
    "train_begin",
    "epoch_begin",
    "step_begin",
    "step_end",
    "log",
    "evaluate",
    "save",
    "epoch_end",
    "train_end",
):
    setattr(Witness, f"on_{_event}", _told(_event))


@pytest.fixture
def frozen(monkeypatch) -> list[list[int]]:
    """The sums that came to the door. What leaves it is settled."""
    sums = []

    def released(noise, values):
        sums.append(values)
        return [(-1) ** len(sums) * (len(sums) % STEPS + 1) * 2**38 + k for k in range(len(values))]

    monkeypatch.setattr(DiscreteGaussian, "add", released)
    monkeypatch.setattr(BernoulliSampler, "draw", lambda mask: np.arange(mask.size) % 3 == 0)
    for clock in ("time", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: 1e9)
    return sums


def build_model(lora: bool | str) -> torch.nn.Module:
    if lora != "upper":
        return with_lora(one_layer()) if lora else one_layer()
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    return get_peft_model(classifier(num_hidden_layers=2), config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same for all runs, for they write down where they are."""
    return tmp_path_factory.mktemp("twins") / "out"


@pytest.fixture(scope="module")
def ordinary() -> dict:
    """What runs on ordinary data left behind, which all twins are compared with, and what came to their doors."""
    return {}


@pytest.fixture
def leave_behind(make_args, tokenizer, folder, capsys, caplog):
    caplog.set_level(logging.WARNING, logger="filelock")  # It names locks by their addresses in memory.
    caplog.set_level(logging.INFO)  # Last, because each call sets the level of what is kept, too.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_debug()

    def run(row, *, lora, users=False, more=(), **changes) -> tuple[dict[str, bytes], str, list]:
        """All that a run on data with `row` among them leaves: files, streams, and what callbacks saw."""
        torch.manual_seed(0)
        data = labelled_rows(ROWS).to_list()
        data[6] = row
        if users:
            data = [{**row, "user": f"user {number}"} for number, row in enumerate(data)]
            changes |= {"privacy_unit_column": "user", "max_rows_per_unit": 2}
        data += more
        witness = Witness()
        args = make_args(
            output_dir=str(folder),
            max_steps=STEPS,
            expected_batch_size=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=3,
            log_level="debug",
            **changes,
        )
        trainer = ZOTrainer(
            model=build_model(lora),
            args=args,
            train_dataset=data,
            eval_dataset=labelled_rows(6, seed=1),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_accuracy,
            callbacks=[witness],
        )
        output = trainer.train()
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", output.metrics)
        trainer.log_metrics("train", output.metrics)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        shutil.rmtree(folder)
        captured = capsys.readouterr()
        text = re.sub(
            r"[\d.]+it/s|\?it/s", "", captured.out + captured.err + caplog.text
        )  # How fast a file was written.
        caplog.clear()
        return files, text, witness.seen

    yield run
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_run_and_its_twin_leave_the_same_bytes(name, lora, frozen, leave_behind, ordinary):
    settings = {"lora": lora, "clip_norm": 0.01, "padded_lengths": [16]}
    if lora not in ordinary:
        ordinary[lora] = *leave_behind(ORDINARY, **settings), frozen[:]
        frozen.clear()
    files, text, seen, sums = ordinary[lora]
    twin_files, twin_text, twin_seen = leave_behind(NEIGHBOURS[name], **settings)
    assert files.keys() == twin_files.keys()
    assert [path for path in files if files[path] != twin_files[path]] == []
    assert text == twin_text
    assert seen == twin_seen
    moved = np.abs(np.array(sums) - np.array(frozen))
    # One row is replaced by another: it leaves with at most the sensitivity, and the other comes with as much.
    assert 0 < moved.max() <= (2 if name == "another row" else 1) * SENSITIVITY


@pytest.mark.parametrize(
    ("name", "place"),
    [("another row", "memory"), ("a long row", "memory"), ("a wrong token", "memory"), ("not a row", "disk")],
)
def test_a_run_that_keeps_rows_and_its_twin_leave_the_same_bytes(name, place, frozen, leave_behind, ordinary):
    settings = {"lora": "upper", "clip_norm": 0.01, "padded_lengths": [16], "frozen_cache": place}
    if place not in ordinary:
        ordinary[place] = *leave_behind(ORDINARY, **settings), frozen[:]
        frozen.clear()
    files, text, seen, sums = ordinary[place]
    twin_files, twin_text, twin_seen = leave_behind(NEIGHBOURS[name], **settings)
    assert files.keys() == twin_files.keys()
    assert [path for path in files if files[path] != twin_files[path]] == []
    assert (text, seen) == (twin_text, twin_seen)
    moved = np.abs(np.array(sums) - np.array(frozen))
    assert 0 < moved.max() <= (2 if name == "another row" else 1) * SENSITIVITY


@pytest.mark.parametrize("rows", [37, 600])
def test_runs_whose_users_have_other_numbers_of_rows_leave_the_same_bytes(rows, frozen, leave_behind):
    """A user's one row, or many: all that is published tells the number of users, and no number of rows."""
    settings = {"lora": True, "clip_norm": 0.01, "padded_lengths": [16], "users": True}
    files, text, seen = leave_behind(ORDINARY, **settings)
    sums = frozen[:]
    frozen.clear()
    more = [{**ORDINARY, "labels": 1, "user": "user 6"}] * (rows - 1)
    twin_files, twin_text, twin_seen = leave_behind(ORDINARY, **settings, more=more)
    assert files.keys() == twin_files.keys()
    assert [path for path in files if files[path] != twin_files[path]] == []
    assert text == twin_text
    assert f"Num examples = {ROWS}" in text
    assert seen == twin_seen
    assert 0 < np.abs(np.array(sums) - np.array(frozen)).max() <= 2 * SENSITIVITY


def test_the_twin_run_sees_what_leaks(frozen, leave_behind, monkeypatch):
    """The test above can fail: here a count of tokens gets out."""
    step = ZOTrainer.training_step

    def leaking(trainer, model, inputs, num_items_in_batch=None):
        lengths = [one.inputs["input_ids"].shape[1] for one in inputs["batch"].micro_batches if one.inputs]
        trainer.state.log_history.append({"eval_tokens": sum(lengths)})
        return step(trainer, model, inputs, num_items_in_batch)

    monkeypatch.setattr(ZOTrainer, "training_step", leaking)
    files, _, seen = leave_behind(ORDINARY, lora=True)
    twin_files, _, twin_seen = leave_behind(NEIGHBOURS["a long row"], lora=True)
    assert seen != twin_seen
    assert [path for path in files if files[path] != twin_files[path]]


def test_files_of_a_run_are_known(frozen, leave_behind):
    """Whatever comes to be written beside them has to be looked at first."""
    files, _, _ = leave_behind(ORDINARY, lora=True)
    names = {Path(path).name for path in files}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "initial.safetensors",
        "privacy.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train_results.json",
        "all_results.json",
        "trainer_state.json",
        "training_args.bin",
        "training.png",
        "trajectory.zo",
        "trajectory.zo.lock",
        "trajectory_checkpoint.json",
    }
