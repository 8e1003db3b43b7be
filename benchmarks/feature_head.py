"""Measures a step of a head on features, beside the product of matrices that it cannot do without.

    python benchmarks/feature_head.py

The batch is all rows. The frozen base is a toy of the same width, because no step calls it: its features are computed
once, before the first step. One thread computes. After each step the product of the features with the weights at all
probe points is computed alone, so that both are measured at the same time and under the same load.
"""

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from shared import table
from transformers import LlamaConfig, LlamaModel, TrainerCallback

from hf_dpzo import FeatureClassifier, ZOTrainer, ZOTrainingArguments


# Steps that are not counted: the first ones fill caches, and check that the model moves.
WARM_UP = 5


class Clock(TrainerCallback):
    """Takes the time from the end of each step to that of the next, and between them that of the product alone."""

    def __init__(self, rows: int, width: int, columns: int) -> None:
        self._features, self._weights = torch.randn(rows, width), torch.randn(columns, width)
        self._last: float | None = None
        self.steps: list[float] = []
        self.products: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time of the step that ends here, and compute the product."""
        now = time.perf_counter()
        if self._last is not None:
            self.steps.append(now - self._last)
        torch.mm(self._features, self._weights.T)
        self._last = time.perf_counter()
        self.products.append(self._last - now)


def main() -> None:
    """Train, and show a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--directions", type=int, default=64)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = measure(**vars(options))
    steps, products = clock.steps[WARM_UP:], clock.products[WARM_UP:]
    lines = [
        [name, f"{1000 * f(steps):.1f} ms", f"{1000 * f(products):.1f} ms", f"{f(steps) / f(products):.2f}"]
        for name, f in (("median", statistics.median), ("fastest", min))
    ]
    sys.stdout.write("\n".join([*table(["", "a step", "the product alone", "ratio"], lines), ""]))


def measure(rows: int, width: int, directions: int, classes: int, steps: int) -> Clock:
    """Train a head of `classes` on `rows` made-up rows, and return the times of its steps."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = FeatureClassifier.on_base(LlamaModel(config), id2label={number: str(number) for number in range(classes)})
    clock = Clock(rows, width, 2 * directions * classes)
    with tempfile.TemporaryDirectory() as folder:
        args = ZOTrainingArguments(
            output_dir=folder,
            method="aggzo",
            num_directions=directions,
            noise_multiplier=10.0,
            target_delta=1e-5,
            clip_norm=0.05,
            smoothing=0.1,
            learning_rate=1.0,
            expected_batch_size=rows,
            max_steps=WARM_UP + steps,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
        )
        made_up = Dataset.from_list([{"input_ids": [1 + row % 60], "labels": row % classes} for row in range(rows)])
        ZOTrainer(model=model, args=args, train_dataset=made_up, callbacks=[clock]).train()
    return clock


if __name__ == "__main__":
    main()
