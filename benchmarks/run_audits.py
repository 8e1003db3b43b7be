"""What audits of runs find: lower bounds on epsilon beside the claim, of honest runs and of some with half the noise.

    python benchmarks/run_audits.py [--repeats 5] [--picture audits.png]

A tiny model with random weights is trained through the Trainer, with canaries and a few other rows, which the auditor
does not know. The fault is planted here, in the sampler of the noise: the claim, the log and the card are the same.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from shared import table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorWithPadding, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.auditing.run_audit import RunAudit
from hf_dpzo.plots import create_figure
from hf_dpzo.privacy.noise import DiscreteGaussian


ROWS, CANARIES, STEPS, DIRECTIONS, RATE = 16, 64, 40, 16, 0.5
CLAIMED = (1.0, 2.0, 4.0, 8.0)
FACTORS = {"as claimed": 1.0, "half": 0.5}
TITLES = (
    "epsilon claimed",
    "noise",
    "epsilon at least",
    "smallest, largest",
    "from guesses",
    "right guesses",
    "beyond",
)


@contextmanager
def noise_times(factor: float) -> Iterator[None]:
    """Draw `factor` times the noise that is claimed."""
    honest = DiscreteGaussian.add

    def add(noise: DiscreteGaussian, sums: list[int]) -> list[int]:
        return honest(DiscreteGaussian(scale=int(noise.scale * factor)), sums)

    with mock.patch.object(DiscreteGaussian, "add", add):
        yield


def build_rows(seed: int) -> Dataset:
    """Return rows of random tokens and labels."""
    draw = np.random.default_rng(seed)
    rows = [{"input_ids": draw.integers(4, 64, size=8).tolist(), "labels": int(draw.integers(2))} for _ in range(ROWS)]
    return Dataset.from_list([{**row, "attention_mask": [1] * 8} for row in rows])


def train_and_audit(epsilon: float, factor: float, seed: int) -> RunAudit:
    """Train a tiny model with `factor` times the noise that `epsilon` needs, and audit the run."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes))
    with tempfile.TemporaryDirectory() as folder, noise_times(factor):
        args = ZOTrainingArguments(
            output_dir=folder,
            method="aggzo",
            num_directions=DIRECTIONS,
            target_epsilon=epsilon,
            target_delta=1e-5,
            expected_batch_size=int(RATE * (ROWS + CANARIES)),
            canaries=CANARIES,
            max_steps=STEPS,
            clip_norm=1e-3,  # So that each row is clipped, which is the most that it can add.
            learning_rate=1e-3,
            seed=seed,
            per_device_train_batch_size=64,
            padded_lengths=[8],
            save_strategy="no",
            logging_steps=STEPS,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
        trainer = ZOTrainer(
            model=model, args=args, train_dataset=build_rows(seed), data_collator=DataCollatorWithPadding(tokenizer)
        )
        trainer.train()
        return trainer.audit_run()


def draw(found: dict[tuple[float, str], list[RunAudit]], path: Path) -> None:
    """Draw each run's bound beside its claim."""
    figure = create_figure(path, size=(6, 5))
    axes = figure.add_subplot()
    for name, color in zip(FACTORS, ("tab:blue", "tab:red"), strict=True):
        audits = [audit for (_, noise), repeats in found.items() if noise == name for audit in repeats]
        claimed, bounds = [one.epsilon_claimed for one in audits], [one.epsilon_lower for one in audits]
        axes.plot(claimed, bounds, color=color, marker="o", linestyle="none", alpha=0.6, label=f"noise {name}")
    axes.plot([0, max(CLAIMED)], [0, max(CLAIMED)], color="0.5", linestyle=":", label="the claim")
    axes.set(xlabel="ε claimed", ylabel="ε at least, with 95 % confidence")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    started = time.perf_counter()
    found = {
        (epsilon, name): [train_and_audit(epsilon, factor, seed) for seed in range(options.repeats)]
        for epsilon in CLAIMED
        for name, factor in FACTORS.items()
    }
    rows = []
    for (epsilon, name), audits in found.items():
        bounds = [one.epsilon_lower for one in audits]
        rows.append(
            [
                f"{epsilon:g}",
                name,
                f"{np.mean(bounds):.2f}",
                f"{min(bounds):.2f}, {max(bounds):.2f}",
                f"{np.mean([one.from_guesses for one in audits]):.2f}",
                f"{np.mean([one.correct / one.guesses for one in audits]):.0%}",
                f"{sum(one.exceeds_claim for one in audits)} of {len(audits)}",
            ]
        )
    if options.picture is not None:
        draw(found, options.picture)
    note = f"{time.perf_counter() - started:.0f} seconds for {len(rows) * options.repeats} runs with their audits."
    sys.stdout.write("\n".join([*table(TITLES, rows), "", note]) + "\n")


if __name__ == "__main__":
    main()
