"""What a tracker keeps of a private run, read back from where it keeps it."""

import json
import math
import os
import sqlite3
import struct
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset
from tensorboardX.proto.event_pb2 import Event
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.integrations import WandbCallback

from hf_dpzo import ZOTrainer
from hf_dpzo.recipe.tasks.metrics import compute_accuracy

from support.models import one_layer, with_lora
from support.rows import labelled_rows


MARK = "mark-of-a-private-row"
PUBLIC = {"epoch", "learning_rate", "epsilon", "step", "global_step"}
STEPS = 4


@dataclass(kw_only=True)
class Kept:
    """What a tracker keeps.

    Args:
        scalars: the values of each metric, in order.
        texts: by name.
        machine: the names of what was measured of the machine.
        content: of all its files.
    """

    scalars: dict[str, list[float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    machine: set[str] = field(default_factory=set)
    content: bytes = b""

    @property
    def unreleased(self) -> set[str]:
        """Metrics that neither are released or public nor belong to an evaluation."""
        return {name for name in self.scalars if not name.startswith("eval/")} - {f"train/{name}" for name in PUBLIC}

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.scalars.setdefault(name, []).append(value)


def of_tensorboard(folder: Path) -> Kept:
    """Each record is a length, its checksum, an event, and a checksum."""
    kept = Kept()
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        kept.content += (data := file.read_bytes())
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            for value in Event.FromString(data[12 : 12 + length]).summary.value:
                if value.HasField("simple_value"):
                    kept.add({value.tag: value.simple_value})
                else:
                    kept.texts[value.tag.removesuffix("/text_summary")] = value.tensor.string_val[0].decode()
            data = data[16 + length :]
    return kept


def of_trackio(folder: Path) -> Kept:
    kept = Kept(content=b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file()))
    (file,) = folder.glob("*.db")
    with sqlite3.connect(file) as base:
        base.row_factory = sqlite3.Row
        names = [row["name"] for row in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        tables = {name: [dict(row) for row in base.execute(f"SELECT * FROM {name}")] for name in names}
    base.close()
    for row in tables.pop("metrics"):
        kept.add(json.loads(row["metrics"]))
    kept.texts["args"] = tables.pop("configs")[0]["config"]
    kept.machine = {name for row in tables.pop("system_metrics") for name in json.loads(row["metrics"])}
    assert not {name for name, rows in tables.items() if rows} - {"sqlite_sequence", "project_metadata"}
    return kept


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory) -> Path:
    """Where trackio keeps things, which it asks for once."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    return Path(os.environ["TRACKIO_DIR"])


@pytest.fixture(params=["tensorboard", "trackio"])
def tracker(request, tmp_path, trackio_folder, monkeypatch):
    """The name of a tracker, and what reads what it has kept of this test's runs."""
    monkeypatch.setenv("A_SECRET", MARK)
    if request.param == "tensorboard":
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        return request.param, lambda: of_tensorboard(tmp_path / "events")
    import trackio

    for file in trackio_folder.iterdir():
        file.unlink()
    often = partial(trackio.init, cpu_log_interval=0.01)  # Beyond the ten seconds that it waits, these runs are over.
    # As the documentation says.
    monkeypatch.setattr(trackio, "init", partial(often, auto_log_cpu=False, auto_log_gpu=False))
    return request.param, lambda: of_trackio(trackio_folder)


def marked_rows(count: int, seed: int = 0) -> Dataset:
    return labelled_rows(count, seed).add_column("text", [MARK] * count)


@pytest.fixture
def train(make_args, tokenizer):
    """A run of either trainer, which evaluates too."""

    def run(tracker: str, *, private: bool = True, **changes) -> Trainer:
        args = make_args(report_to=[tracker], eval_strategy="steps", eval_steps=2, **changes)
        if not private:
            told = {name: getattr(args, name) for name in ("output_dir", "max_steps", "logging_steps", "eval_steps")}
            told |= {"use_cpu": True, "disable_tqdm": True, "include_num_input_tokens_seen": "all"}
            args = TrainingArguments(report_to=[tracker], eval_strategy="steps", save_strategy="no", **told)
        trainer = (ZOTrainer if private else Trainer)(
            model=with_lora(one_layer()),
            args=args,
            train_dataset=marked_rows(40),
            eval_dataset=labelled_rows(12, seed=1),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_accuracy,
        )
        trainer.train()
        return trainer

    return run


def test_a_tracker_keeps_only_what_was_released(tracker, train):
    name, read = tracker
    trainer, kept = train(name), read()
    assert not kept.unreleased
    assert not kept.machine
    assert MARK.encode() not in kept.content

    logged = [log for log in trainer.state.log_history if "epsilon" in log]
    assert kept.scalars["train/epsilon"] == pytest.approx([log["epsilon"] for log in logged])
    assert kept.scalars["train/learning_rate"] == pytest.approx([log["learning_rate"] for log in logged])
    assert len(logged) == STEPS
    assert len(kept.scalars["eval/accuracy"]) == 2
    assert all(math.isfinite(value) for values in kept.scalars.values() for value in values)

    known = json.loads(trainer.args.to_json_string())
    written = json.loads(kept.texts["args"])
    assert {key: value for key, value in written.items() if key in known} == known
    settings = {*known, *trainer.model.config.to_dict(), "peft_config", "model/num_parameters"}
    settings.add("allow_val_change")  # Which trackio 0.43 takes for one, as it is given by name.
    assert {key for key in written if not key.startswith("_")} <= settings
    assert set(kept.texts) <= {"args", "model_config"}


def test_what_stock_training_reports_to_a_tracker_would_be_seen(tracker, train):
    name, read = tracker
    train(name, private=False)
    unreleased = read().unreleased
    assert {"train/loss", "train/grad_norm"} <= unreleased
    assert any("num_input_tokens_seen" in key for key in unreleased)


def test_a_row_that_reached_a_tracker_would_be_seen(tracker, train):
    name, read = tracker
    train(name, run_name=MARK)
    assert MARK.encode() in read().content


@pytest.mark.parametrize("tracker", ["trackio"], indirect=True)
def test_trackio_measures_the_machine_unless_told_otherwise(tracker, train, monkeypatch):
    import trackio

    name, read = tracker
    monkeypatch.setattr(trackio, "init", partial(trackio.init, auto_log_cpu=None))
    trainer = train(name)
    kept = read()
    assert {"cpu/utilization", "memory/used"} <= kept.machine
    assert not kept.unreleased and trainer.state.global_step == STEPS


def test_counting_forward_passes_is_refused(make_args, monkeypatch):
    monkeypatch.setenv("WANDB_WATCH", "all")
    with pytest.raises(ValueError, match=r"WANDB_WATCH=all: it counts forward passes, .* unset it"):
        ZOTrainer(model=one_layer(), args=make_args(), train_dataset=labelled_rows(40), callbacks=[WandbCallback])
