"""What several processes gain, and what a slow network costs them.

    python recipes/processes/measure.py

Runs of an encoder of BERT-base's architecture with an adapter, through the Trainer, in one process and in two, of one
thread each, taking turns. A slow network is made by waiting before each collective, in all processes.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, default_data_collator

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.initial import seeded_peft_model
from hf_dpzo.processes import Group


TOKENS, STEPS, ROUNDS = 64, 6, 3
# Rows, directions, and what is shared out.
EXAMPLES = {"rows": 32, "directions": 1, "parallel": "examples"}
FEW_EXAMPLES = {"rows": 2, "directions": 8, "parallel": "examples"}
FEW_POINTS = {"rows": 2, "directions": 8, "parallel": "points"}
LATENCIES = (0.0, 0.001, 0.01, 0.1)


class Laps(TrainerCallback):
    """The seconds from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step, the median."""
        return statistics.median(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))


def slowed(latency: float) -> None:
    """Let each collective of a step wait before it begins."""
    for name in ("sum", "told", "by_first"):
        inner = getattr(Group, name)

        @functools.wraps(inner)
        def late(self: Group, *given: Any, _inner: Any = inner) -> Any:
            time.sleep(latency)
            return _inner(self, *given)

        setattr(Group, name, late)


def work(case: dict[str, Any]) -> None:
    """Train, in one of the processes of a run; the first one writes what a step took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    model = seeded_peft_model(BertForSequenceClassification(config), lora, seed=0)
    ids = torch.randint(5, 30_000, (case["rows"], TOKENS)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * TOKENS, "labels": i % 2} for i, row in enumerate(ids)]
    laps = Laps()
    slowed(case["latency"])
    args = ZOTrainingArguments(
        output_dir=case["folder"],
        method="aggzo",
        num_directions=case["directions"],
        noise_multiplier=1.0,
        target_delta=1e-3,
        expected_batch_size=case["rows"],
        per_device_train_batch_size=16,
        max_steps=STEPS + 1,
        learning_rate=1e-6,
        parallel=case["parallel"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ZOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        callbacks=[laps],
    )
    if args.world_size != case["processes"]:
        raise RuntimeError(f"processes={case['processes']}: {args.world_size} were started.")
    trainer.train()
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        Path(case["result"]).write_text(str(laps.seconds))


def measured(processes: int, case: dict[str, Any], latency: float = 0.0) -> float:
    """Seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds"
        told = {**case, "processes": processes, "latency": latency, "folder": folder, "result": str(result)}
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), __file__, json.dumps(told)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
        return float(result.read_text())


def ratios(first: tuple[int, dict[str, Any]], second: tuple[int, dict[str, Any]]) -> list[float]:
    """How many times as fast the second is, in each round; they take turns."""
    return [measured(*first) / measured(*second) for _ in range(ROUNDS)]


def spread(values: list[float]) -> str:
    """The median, and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Print the tables."""
    lines = ["| two processes beside one | times as fast |", "|---|---|"]
    for words, case in (
        ("32 rows, 1 direction, `parallel=examples`", EXAMPLES),
        ("2 rows, 8 directions, `parallel=examples`", FEW_EXAMPLES),
        ("2 rows, 8 directions, `parallel=points`", FEW_POINTS),
    ):
        lines.append(f"| {words} | {spread(ratios((1, case), (2, case)))} |")
    lines += ["", "| each collective waits for | a step of two processes, ms | more, ms |", "|---|---|---|"]
    times = {latency: measured(2, EXAMPLES, latency) * 1e3 for latency in LATENCIES}
    for latency, found in times.items():
        lines.append(f"| {latency * 1e3:g} ms | {found:.0f} | {found - times[0.0]:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(json.loads(sys.argv[1]))
    else:
        main()
