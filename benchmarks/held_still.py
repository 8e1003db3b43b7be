"""What it costs that a model is held still while rows are evaluated, and compared before it is saved.

    python benchmarks/held_still.py

Steps of one run take turns: as they are, and without guard, checksums and restored buffers. Every row has 64 random
tokens, and a batch has as many rows as expected, on average. The model is of OPT-125M's architecture with random
weights. Times are of the processor. The comparison before a save reads everything that is not trained.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.models.seal import Seal
from hf_dpzo.models.state import ModelState


TOKENS, STEPS, ROWS = 64, 17, 100


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows on the right."""
    fillers = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    width = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
        for name, filler in fillers.items()
    }


class TakingTurns(ZOTrainer):
    """Holds the model still in every second step, and notes how long each step and its update take."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        """Take a step and its update, which stock would make later."""
        held = self.state.global_step % 2 == 0
        with ExitStack() as patches:
            for owner, name in () if held else ((ModelState, "guarded"), (ModelState, "held_still")):
                patches.enter_context(patch.object(owner, name, lambda state, model: nullcontext()))
            for name in () if held else ("check", "apply"):
                patches.enter_context(patch.object(Seal, name, lambda seal: None))
            begin = time.process_time()
            loss = super().training_step(*given, **named)
            self._build_descent().optimizer.step()
            self.seconds[held].append(time.process_time() - begin)
        self._seal.apply()
        return loss


class UpdatedBefore:
    """Stands in for an optimizer whose step was taken already."""


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
        trainer = TakingTurns(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collate)
        trainer.train()
    return statistics.median(trainer.seconds[True][1:]), statistics.median(trainer.seconds[False][1:])
