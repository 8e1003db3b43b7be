"""What a step costs beside its forward passes, and whether it costs more after 100,000 of them.

    python benchmarks/long_run.py [steps]

A toy model is trained through the Trainer, privately, with logs, evaluations and checkpoints. The first table is of CPU
time, which other processes disturb less, and of memory, a hundred times a run. The second is of the time that passed,
since a log waits for the disk; what is measured within another part counts for the inner one alone.
"""

import gc
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging as transformers_logging

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.sampling import SealedRows
from hf_dpzo.data.sealed import run_sealed
from hf_dpzo.losses.per_example import ScoreLoss
from hf_dpzo.models.unwrap import Inputs
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.mechanism import IntegerSum
from hf_dpzo.privacy.noise import BernoulliSampler
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.trainer.redacting import RedactingTrainer
from hf_dpzo.trainer.resumable import ResumableTrainer
from hf_dpzo.trajectory.writer import TrajectoryWriter
from hf_dpzo.zo.optimizer import ZOOptimizer


STEPS, LOOKS = 100_000, 100
LOOKING = "looking"


@dataclass(kw_only=True)
class Stopwatch:
    """Adds up the time that passes in some functions; in a function within another, for the inner one alone."""

    seconds: Counter = field(default_factory=Counter)
    running: list[list[float]] = field(default_factory=list)

    def watch(self, row: str, owner: Any, name: str) -> None:
        """Time the function of that name from now on."""
        inner: Callable = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            self.running.append([0.0])
            try:
                return inner(*args, **options)
            finally:
                passed = time.perf_counter() - began
                self.seconds[row] += passed - self.running.pop()[0]
                if self.running:
                    self.running[-1][0] += passed

        setattr(owner, name, timed)


class Record(TrainerCallback):
    """CPU seconds, seconds and memory, a hundred times a run.

    Python frees what refers to itself only when there is a quarter as much of it as of everything else, so that memory
    rises and falls. Here it is freed before each look, in time that does not count.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float, int]] = []
        self.cpu = self.wall = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record, once in a while."""
        if state.global_step % (args.max_steps // LOOKS) == 0:
            cpu, wall = time.process_time(), time.perf_counter()
            gc.collect()
            memory = psutil.Process().memory_info().rss
            self.rows.append((state.global_step, cpu - self.cpu, wall - self.wall, memory))
            self.cpu += time.process_time() - cpu
            self.wall += time.perf_counter() - wall


# What is timed: in which row of the table, and where it happens.
TIMED = (
    ("accounting", Budget, "require_steps"),
    ("accounting", Budget, "spend"),
    ("accounting", Budget, "running_epsilon"),
    ("log", TrajectoryWriter, "append"),
    ("waiting for the disk", os, "fsync"),
    ("logging", RedactingTrainer, "log"),
    ("callbacks", CallbackHandler, "call_event"),
    ("sampling", BernoulliSampler, "draw"),
    ("fetching rows", SealedRows, "__getitems__"),
    ("collating", LogicalBatchCollator, "__call__"),
    ("clipping and noise", IntegerSum, "release"),
    ("losses", BatchLosses, "__call__"),
    ("update", ZOOptimizer, "step"),
    ("checkpoints, with cards", ResumableTrainer, "_save_checkpoint"),
    ("evaluation", RedactingTrainer, "evaluate"),
    (LOOKING, Record, "on_step_end"),
)


class Squares(ScoreLoss):
    """The loss of a toy: squared errors of a line."""

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """What the line says, `[batch]`."""
        return model(inputs["x"]).squeeze(1)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Its squared errors, `[batch]`."""
        return (scores - inputs["labels"]).square()


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as tensors."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("x", "labels")}


def toy(folder: str, steps: int, record: Record) -> ZOTrainer:
    """A line through 512 points, and what trains it."""
    generator = np.random.default_rng(0)
    points = generator.normal(size=(640, 4)).astype(np.float32)
    rows = [{"x": x.tolist(), "labels": float(x @ [1.0, -1.0, 0.5, 0.0])} for x in points]
    args = ZOTrainingArguments(
        output_dir=folder,
        method="dpzero",
        target_epsilon=2,
        target_delta=1e-5,
        expected_batch_size=8,
        per_device_train_batch_size=16,
        max_steps=steps,
        learning_rate=1e-3,
        smoothing=1e-3,
        logging_steps=max(1, steps // 1000),
        eval_strategy="steps",
        eval_steps=max(1, steps // 100),
        eval_data_is_public=True,
        save_steps=max(1, steps // 50),
        save_total_limit=2,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ZOTrainer(
        model=torch.nn.Linear(4, 1),
        args=args,
        data_collator=stack,
        train_dataset=Dataset.from_list(rows[:512]),
        eval_dataset=Dataset.from_list(rows[512:]),
        per_example_loss=Squares(),
        probe_rows=rows[512:520],
        callbacks=[record],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def cost_of_a_seal(times: int = 2000) -> float:
    """Seconds of one call of `sealed`, in a process that has trained."""
    began = time.process_time()
    for _ in range(times):
        run_sealed("nothing", int)
    return (time.process_time() - began) / times


def growth(record: Record) -> list[str]:
    """The table that compares the first with the last steps."""
    at, cpu, _, memory = (np.array(column, dtype=float) for column in zip(*record.rows, strict=True))
    rates, tenth, half = np.diff(cpu) / np.diff(at) * 1e3, len(at) // 10, len(at) // 2
    faster = np.polyfit(at[1:], rates, 1)[0] * 1000
    more = np.polyfit(at[half:], memory[half:] / 2**10, 1)[0] * 1000
    return [
        "| | first tenth | last tenth | slope for 1,000 steps |",
        "|---|---|---|---|",
        f"| ms of CPU a step, median | {np.median(rates[:tenth]):.2f} | {np.median(rates[-tenth:]):.2f} | "
        f"{faster:+.4f} ms |",
        f"| MiB of memory | {memory[:tenth].mean() / 2**20:.0f} | {memory[-tenth:].mean() / 2**20:.0f} | "
        f"{more:+.1f} KiB, in the second half |",
    ]


def shares(record: Record, watch: Stopwatch, steps: int) -> list[str]:
    """The table of what a step's time goes to."""
    wall = record.rows[-1][2] - record.rows[0][2]
    parts = {row: watch.seconds[row] / steps * 1e3 for row in dict.fromkeys(row for row, _, _ in TIMED)}
    del parts[LOOKING]
    parts["all, with the rest of the loop"] = wall / (record.rows[-1][0] - record.rows[0][0]) * 1e3
    return ["| of a step | ms |", "|---|---|", *(f"| {row} | {value:.3f} |" for row, value in parts.items())]


def main() -> None:
    """Train, and print tables."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    torch.set_num_threads(1)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    watch, record = Stopwatch(), Record()
    for row, owner, name in TIMED:
        watch.watch(row, owner, name)
    with tempfile.TemporaryDirectory() as folder:
        trainer = toy(folder, steps, record)
        trainer.train()
    seal = f"One call of `sealed`: {cost_of_a_seal() * 1e6:.0f} microseconds."
    sys.stdout.write("\n".join([*growth(record), "", *shares(record, watch, steps), "", seal]) + "\n")


if __name__ == "__main__":
    main()
