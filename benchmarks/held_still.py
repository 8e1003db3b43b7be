"""What it costs that a model is held still while rows are evaluated, and compared before it is saved.

    python benchmarks/held_still.py

Steps of one run take turns: as they are, and without guard, checksums and restored buffers. Every row has 64 random
tokens, and every batch has the same number of rows, which no private run may have. The model is of OPT-125M's
architecture with random weights. Times are of the processor. The comparison before a save reads everything that is not
trained.
"""

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from shared import table
from transformers import OPTConfig, OPTForCausalLM, TrainerCallback

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.models.seal import Seal
from hf_dpzo.models.state import ModelState
from hf_dpzo.privacy.noise import BernoulliSampler


TOKENS, STEPS, ROWS = 64, 17, 100


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows on the right."""
    fillers = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    width = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
        for name, filler in fillers.items()
    }


class TakingTurns(TrainerCallback):
    """Holds the model still in every second step, and notes how long each step takes, with its update."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._patches = ExitStack()
        self._begin = 0.0
        self.trainer: ZOTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Patch away what holds the model still, in every second step."""
        if state.global_step % 2:
            for name in ("guarded", "held_still"):
                self._patches.enter_context(patch.object(ModelState, name, lambda *_: nullcontext()))
            for name in ("is_broken", "apply"):
                self._patches.enter_context(patch.object(Seal, name, lambda *_: False))
        self._begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the time, and put back what was patched."""
        self.seconds[state.global_step % 2 == 1].append(time.process_time() - self._begin)
        self._patches.close()
        self.trainer._seal.apply()


def measure(rows_per_batch: int, *, lora: bool) -> tuple[float, float]:
    """Return the median seconds of a step with the model held still, and without."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(dropout=0.0)).eval()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    tokens = torch.randint(10, 50_000, (ROWS, TOKENS)).tolist()
    rows = [
        {"input_ids": row, "attention_mask": [1] * TOKENS, "labels": [-100] * (TOKENS - 1) + row[-1:]} for row in tokens
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = ZOTrainingArguments(
            output_dir=folder,
            method="dpzero",
            noise_multiplier=1.0,
            target_delta=1e-3,
            expected_batch_size=rows_per_batch,
            per_device_train_batch_size=rows_per_batch,
            max_steps=STEPS,
            smoothing=1e-3,
            clip_norm=10.0,
            learning_rate=1e-7,
            padded_lengths=[TOKENS],
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        turns = TakingTurns()
        trainer = ZOTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            data_collator=collate,
            callbacks=[turns],
        )
        turns.trainer = trainer
        with patch.object(BernoulliSampler, "draw", lambda sampler: np.arange(sampler.size) < rows_per_batch):
            trainer.train()
    return tuple(statistics.median(turns.seconds[held][1:]) for held in (True, False))


def measure_comparison() -> float:
    """Return the seconds that the comparison before a save takes for a billion numbers in float32."""
    quarter = torch.nn.Module()
    quarter.weight = torch.nn.Parameter(torch.randn(250_000_000))
    state = ModelState(quarter, moving=())
    begin = time.perf_counter()
    state.find_change()
    return 4 * (time.perf_counter() - begin)


def main() -> None:
    """Measure and print everything."""
    rows = []
    for rows_per_batch, lora in ((4, False), (4, True), (16, False)):
        held, free = measure(rows_per_batch, lora=lora)
        name = "LoRA" if lora else "all"
        rows.append((name, f"{rows_per_batch}x{TOKENS}", f"{held:.3f}", f"{free:.3f}", f"{held / free:.3f}"))
    lines = table(("trained", "rows of a batch", "seconds a step", "without", "ratio"), rows)
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.write(f"\nA comparison of a billion numbers: {measure_comparison():.2f} s\n")


if __name__ == "__main__":
    main()
