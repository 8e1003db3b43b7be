"""What is done once is done once, and a step costs as much after many steps as after few. Counted, not timed."""

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hf_dpzo import ZOTrainer
from hf_dpzo.isolation import measure as probing
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.queries import GaussianQuery
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.trainer import resumable as durable
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.writer import TrajectoryWriter

from support.logs import HEADER, record
from support.models import causal_lm, one_layer
from support.paths import MEASUREMENTS
from support.rows import few_public_rows, labelled_rows


RECIPE = MEASUREMENTS / "long_run.py"


@pytest.fixture
def counted(monkeypatch):
    """Counts the calls of functions."""
    counts = Counter()

    def count(owner, name: str) -> Counter:
        inner = getattr(owner, name)

        def counting(*args, **options):
            counts[name] += 1
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, counting)
        return counts

    return count


def calls_of(work) -> int:
    """How many functions, of Python's or C's, `work` calls."""
    calls = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]


# ---- A step ----


def test_budget_and_ledger_do_not_grow_with_the_steps():
    query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01)
    budget = Budget(query=query, planned_steps=100_000, delta=1e-5)

    def steps(count: int) -> None:
        for _ in range(count):
            budget.require_steps()
            budget.spend()

    steps(10)
    early = calls_of(lambda: steps(200))
    steps(90_000)
    assert calls_of(lambda: steps(200)) == pytest.approx(early, abs=5)
    assert len(budget.ledger.releases) == len(budget.claimed_releases) == 1


def test_a_record_costs_one_write_and_one_wait_however_many_there_are(tmp_path, log_of, counted, monkeypatch):
    counts = counted(os, "fsync")
    writer, record = log_of(tmp_path, steps=3000)
    before = (tmp_path / LOG_FILE).stat().st_size

    def append(first: int, count: int) -> None:
        for step in range(first, first + count):
            writer.append(record(step))

    append(0, 10)
    counts.clear()
    early = calls_of(lambda: append(10, 200))
    append(210, 2000)
    late = calls_of(lambda: append(2210, 200))
    writer.close()
    assert late == pytest.approx(early, abs=5)
    assert counts["fsync"] == 2400
    assert (tmp_path / LOG_FILE).stat().st_size - before == 2410 * Trajectory.read(tmp_path).layout.record_size


@pytest.fixture
def log_of():
    def make(folder: Path, *, steps: int):
        plan = {**HEADER["plan"], "steps": steps}
        return TrajectoryWriter.create(folder / LOG_FILE, {**HEADER, "plan": plan}), record

    return make


def test_a_log_that_is_read_takes_the_memory_that_it_takes_on_disk(tmp_path, log_of, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    writer, record = log_of(tmp_path, steps=3000)
    for step in range(3000):
        writer.append(record(step))
    writer.close()
    log = Trajectory.read(tmp_path)
    assert sys.getsizeof(log.records.data) < 1.01 * len(log.records) * log.layout.record_size
    assert (
        log.records[7] == record(7) and log.records[-1] == record(2999) and log.records[5:7] == (record(5), record(6))
    )
    assert log.checksum_after(0) == log.header_checksum and log.checksum_after(3000) == log.records.checksum_at(2999)


class CallsOfSteps(TrainerCallback):
    """How many functions are called in each step."""

    def __init__(self):
        self.calls, self._steps = Counter(), []

    def on_train_begin(self, args, state, control, **kwargs):
        sys.setprofile(lambda frame, event, argument: self.calls.update([event]))

    def on_step_end(self, args, state, control, **kwargs):
        self._steps.append(self.calls["call"] + self.calls["c_call"])

    def on_train_end(self, args, state, control, **kwargs):
        sys.setprofile(None)

    @property
    def each(self) -> list[int]:
        return np.diff(self._steps).tolist()


def test_a_step_of_the_whole_loop_calls_as_much_late_as_early(make_args, tokenizer):
    """With everybody in each batch, all steps do the same work."""
    watch = CallsOfSteps()
    trainer = ZOTrainer(
        model=one_layer(),
        args=make_args(max_steps=60, expected_batch_size=4, logging_strategy="no"),
        train_dataset=labelled_rows(4),
        probe_rows=few_public_rows(),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    early, late = np.median(watch.each[5:25]), np.median(watch.each[-20:])
    assert abs(late - early) < 0.01 * early


@pytest.mark.slow
def test_thousands_of_steps_run_at_a_constant_rate_and_memory(tmp_path):
    spec = importlib.util.spec_from_file_location("long_run", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["long_run"] = recipe  # Where data classes look for their module.
    spec.loader.exec_module(recipe)
    record = recipe.Record()
    recipe.toy(str(tmp_path), 40_000, record).train()
    at, cpu, _, memory = (np.array(column) for column in zip(*record.rows, strict=True))
    rates = np.diff(cpu) / np.diff(at)
    assert np.median(rates[-20:]) < 1.25 * np.median(rates[5:25])
    # A kilobyte a step would be a copy of each record. What the allocator keeps also grows, but by less.
    assert memory[-20:].mean() < memory[20:40].mean() + 2**10 * (at[-20:].mean() - at[20:40].mean())
    assert Trajectory.read(tmp_path).records[-1].step == 39_999


# ---- An evaluation ----


def test_evaluations_while_training_make_and_measure_nothing_again(make_args, counted, tokenizer):
    counts = counted(Accelerator, "prepare_model")
    for owner, name in (
        (ZOTrainer, "get_train_dataloader"),
        (ZOTrainer, "_move_model_to_device"),
        (probing, "probe_isolation"),
        (probing, "refuse_written"),
        (durable, "fingerprint_values"),
        (BatchLosses, "of_public"),
    ):
        counted(owner, name)

    def counts_of(**changes) -> dict[str, int]:
        counts.clear()
        trainer = ZOTrainer(
            model=one_layer(),
            args=make_args(max_steps=4, eval_data_is_public=True, **changes),
            train_dataset=labelled_rows(40),
            eval_dataset=labelled_rows(12, seed=1),
            probe_rows=few_public_rows(),
            processing_class=tokenizer,
        )
        trainer.train()
        evaluated = sum("eval_loss" in row for row in trainer.state.log_history)
        assert evaluated == (4 if changes else 0)
        return dict(counts)

    without = counts_of()
    assert counts_of(eval_strategy="steps", eval_steps=1) == without
    assert (without["prepare_model"], without["probe_isolation"]) == (1, 1)


def test_each_row_is_tokenized_once_however_often_it_is_evaluated(write_recipe, counted):
    counts = counted(PreTrainedTokenizerFast, "__call__")
    recipe, args = read_recipe(write_recipe(rows=60))
    trainer = build_trainer(recipe, args)
    built = counts["__call__"]
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 3 + 1
    assert counts["__call__"] == built


def test_a_second_run_finds_the_tokenized_rows(write_recipe, counted):
    path = write_recipe(rows=60)
    build_trainer(*read_recipe(path)).evaluate()
    counts = counted(PreTrainedTokenizerFast, "__call__")
    recipe, args = read_recipe(path)
    build_trainer(recipe, args)
    assert counts["__call__"] < 30  # For words, and for what the tokenizer puts around a text; there are 60 rows.


@pytest.fixture
def write_recipe(tmp_path, tokenizer, causal_folder):
    def write(*, rows: int) -> str:
        lines = [f"w{i % 40} w{i % 7},{i % 2}" for i in range(rows)]
        (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
        fields = {
            "model_name_or_path": str(causal_folder),
            "data": str(tmp_path / "rows.csv"),
            "eval_rows": 10,
            "eval_data_is_public": True,
            "template": "{text} :",
            "label_words": {0: "bad", 1: "good"},
            "lora_target_modules": ["q_proj"],
            "method": "dpzero",
            "noise_multiplier": 1,
            "target_delta": "1e-3",
            "expected_batch_size": 8,
            "max_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "smoothing": "1e-2",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": str(tmp_path / "out"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.fixture
def causal_folder(tmp_path, tokenizer):
    causal_lm().save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"
