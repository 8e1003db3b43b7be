"""What a checkpoint costs beyond saving its weights: card, `privacy.json`, copy of the log, and mark.

    python benchmarks/checkpoint_card.py
    python benchmarks/checkpoint_card.py --against ../another_checkout

The adapter has as many tensors and parameters as that of lora.yaml, 48 and 184,320; the model below it is small, with
random weights. One run saves eight checkpoints in a row at its beginning and eight more after 1,000 steps. Of each the
time that the stock `Trainer.save_model` takes, which writes the weights, is subtracted. Each checkout is run in a
process of its own, three times in turn. The very first checkpoint of a process, for which the accountants are asked and
what is read once is read, stands by itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainerCallback

from hf_dpzo import ZOTrainer, ZOTrainingArguments, seeded_peft_model


HERE = Path(__file__).parents[1]
ROUNDS, CHECKPOINTS, LATE = 3, 8, 1000
# Seconds, and of these how many the processor was busy.
Cost = list[float]


class SaveAtBothEnds(TrainerCallback):
    """Asks for a checkpoint at each of the first steps, and at each of the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for one."""
        control.should_save = state.global_step <= CHECKPOINTS + 1 or state.global_step > LATE


class TimedTrainer(ZOTrainer):
    """Notes how long each checkpoint takes, without the stock saving of its weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spent: list[Cost] = []

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        stock, weights = Trainer.save_model, []

        def timed(*given: Any, **named: Any) -> None:
            begin = now()
            stock(*given, **named)
            weights.append(now() - begin)

        with patch.object(Trainer, "save_model", timed):
            begin = now()
            super()._save_checkpoint(model, trial)
            whole = now() - begin
        self.spent.append((whole - sum(weights)).tolist())


def now() -> np.ndarray:
    """Seconds that have passed, and that this process has computed."""
    return np.array([time.perf_counter(), time.process_time()])


def adapter() -> torch.nn.Module:
    """Return a small model with an adapter of that size."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 12}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=2, pad_token_id=0, **sizes))
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=60, target_modules=["q_proj", "v_proj"])
    return seeded_peft_model(model, config, seed=1)


def measure() -> dict[str, list[Cost]]:
    """Train with checkpoints; return the seconds of each, by where in the run it was saved."""
    torch.set_num_threads(1)
    rows = Dataset.from_list([{"input_ids": [4 + i % 40, 5, 6, 7], "labels": i % 2} for i in range(1000)])
    with tempfile.TemporaryDirectory() as folder:
        args = ZOTrainingArguments(
            output_dir=folder,
            method="dpzero",
            target_epsilon=2.0,
            target_delta=1e-5,
            expected_batch_size=2,
            max_steps=LATE + CHECKPOINTS,
            per_device_train_batch_size=8,
            save_strategy="steps",
            save_steps=10 * LATE,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = TimedTrainer(model=adapter(), args=args, train_dataset=rows, callbacks=[SaveAtBothEnds()])
        trainer.train()
    first, early, late = trainer.spent[:1], trainer.spent[1 : CHECKPOINTS + 1], trainer.spent[CHECKPOINTS + 1 :]
    return {"the first": first, "after few steps": early, f"after {LATE:,} steps": late}


def measured_in(checkout: Path) -> dict[str, list[Cost]]:
    """Measure the library in `checkout`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--alone"],
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def lines(found: dict[str, list[dict[str, list[Cost]]]]) -> list[str]:
    """A Markdown table of what was measured in each checkout, by its name; of two also how many times as much it is."""
    table = ["| checkpoint | library | median | least | most | processor, median |", "|---" * 6 + "|"]
    for place in next(iter(found.values()))[0]:
        medians = []
        for name, rounds in found.items():
            passed, computed = zip(*(cost for each in rounds for cost in each[place]), strict=True)
            medians.append([statistics.median(passed), statistics.median(computed)])
            shown = [medians[-1][0], min(passed), max(passed), medians[-1][1]]
            table.append(f"| {place} | {name} | {' | '.join(f'{one:.3f} s' for one in shown)} |")
        if len(medians) > 1:
            passed, computed = (other / this for this, other in zip(*medians, strict=True))
            table.append(f"| {place} | other / this | {passed:.1f} | | | {computed:.1f} |")
    return table


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--alone", action="store_true", help="measure once, in this process, and print JSON")
    asked = parser.parse_args()
    if asked.alone:
        sys.stdout.write(f"{json.dumps(measure())}\n")
        return
    checkouts = {"this": HERE} | ({} if asked.against is None else {"other": asked.against})
    found: dict[str, list[dict[str, list[Cost]]]] = {name: [] for name in checkouts}
    for _ in range(ROUNDS):
        for name, checkout in checkouts.items():
            found[name].append(measured_in(checkout))
    sys.stdout.write("\n".join(lines(found)) + "\n")


if __name__ == "__main__":
    main()
