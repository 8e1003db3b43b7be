"""What several processes gain, and what a slow network costs them.

    python benchmarks/processes.py

Runs of an encoder with an adapter, through the Trainer, in one process and in two, of one thread each, taking turns:
BERT-base's architecture for what processes gain; a small one for what a slow network costs, which is made by waiting
before each collective, in all processes.
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
from hf_dpzo.distributed.processes import DistributedProcesses
from hf_dpzo.models.seeded import seeded_peft_model


TOKENS, ROUNDS = 64, 3
BASE: dict[str, Any] = {"steps": 6, "sizes": {}, "latency": 0.0}
# Rows, directions, and what is shared out.
EXAMPLES = {**BASE, "rows": 32, "directions": 1, "parallel": "examples"}
FEW_EXAMPLES = {**BASE, "rows": 2, "directions": 8, "parallel": "examples"}
FEW_POINTS = {**BASE, "rows": 2, "directions": 8, "parallel": "points"}
SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
NETWORK = {"rows": 8, "directions": 1, "steps": 40, "sizes": SMALL}
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
    for name in ("reduce_sum", "broadcast", "run_on_first"):
        inner = getattr(DistributedProcesses, name)

        @functools.wraps(inner)
        def late(self: DistributedProcesses, *given: Any, _inner: Any = inner) -> Any:
            time.sleep(latency)
            return _inner(self, *given)

        setattr(DistributedProcesses, name, late)


def work(case: dict[str, Any]) -> None:
    """Train, in one of the processes of a run; the first one writes what a step took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **case["sizes"])
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
        max_steps=case["steps"] + 1,
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


def measured(processes: int, case: dict[str, Any]) -> float:
    """Seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds"
        told = {**case, "processes": processes, "folder": folder, "result": str(result)}
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), __file__, json.dumps(told)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
        return float(result.read_text())


def spread(values: list[float], digits: int) -> str:
    """The median, and the range."""
    middle, low, high = (f"{one:.{digits}f}" for one in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def say(*cells: str) -> None:
    """Print a row of a table at once."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def gains() -> None:
    """Two processes beside one."""
    say("batch", "one process, s", "two, s", "times as fast")
    say("---", "---", "---", "---")
    for case in (EXAMPLES, FEW_EXAMPLES, FEW_POINTS):
        times = [(measured(1, case), measured(2, case)) for _ in range(ROUNDS)]  # They take turns.
        one, two = ([pair[i] for pair in times] for i in (0, 1))
        ratios = [pair[0] / pair[1] for pair in times]
        words = f"{case['rows']} rows, {case['directions']} direction(s), `parallel={case['parallel']}`"
        say(words, spread(one, 2), spread(two, 2), spread(ratios, 2))


def delays() -> None:
    """What waiting before each collective adds to a step."""
    say("each collective waits for", "`parallel=examples`, ms a step", "`parallel=points`, ms a step")
    say("---", "---", "---")
    found: dict[str, list[float]] = {"examples": [], "points": []}
    for latency in LATENCIES:
        cases = {parallel: {**NETWORK, "parallel": parallel, "latency": latency} for parallel in found}
        times = [{parallel: measured(2, case) * 1e3 for parallel, case in cases.items()} for _ in range(ROUNDS)]
        rounds = {parallel: [one[parallel] for one in times] for parallel in found}
        for parallel, medians in found.items():
            medians.append(statistics.median(rounds[parallel]))
        say(f"{latency * 1e3:g} ms", *(spread(rounds[parallel], 0) for parallel in found))
    slopes = (statistics.linear_regression([one * 1e3 for one in LATENCIES], times).slope for times in found.values())
    say("fitted: ms a step for each ms", *(f"{slope:.2f}" for slope in slopes))


def main() -> None:
    """Print the tables."""
    gains()
    sys.stdout.write("\n")
    delays()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(json.loads(sys.argv[1]))
    else:
        main()
