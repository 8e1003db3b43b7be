"""Whole runs of an encoder whose weights are random and whose embeddings are few."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, default_data_collator

from hf_dpzo import ZOTrainer, ZOTrainingArguments


WORDS = 1000


class Laps(TrainerCallback):
    """The CPU seconds from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Of a step, the least."""
        return min(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))


def encoder(layers: int, hidden: int) -> BertConfig:
    """Its shape."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(num_hidden_layers=layers, vocab_size=WORDS, **sizes, **drops)


def trained(case: dict[str, Any], folder: Path) -> dict[str, float]:
    """Seconds of a whole step of a run that trains all parameters, each step on all rows."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(encoder(case["layers"], case["hidden"]))
    ids = torch.randint(5, WORDS, (case["rows"], case["tokens"])).tolist()
    rows = [{"input_ids": one, "attention_mask": [1] * len(one), "labels": i % 2} for i, one in enumerate(ids)]
    laps = Laps()
    args = ZOTrainingArguments(
        output_dir=str(folder),
        method="aggzo",
        num_directions=case["directions"],
        noise_multiplier=1.0,
        target_delta=1e-3,
        expected_batch_size=case["rows"],
        per_device_train_batch_size=case["rows"],
        max_steps=case["times"] + 1,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows)
    ZOTrainer(model=model, args=args, train_dataset=data, data_collator=default_data_collator, callbacks=[laps]).train()
    return {"seconds": laps.seconds, "trained": sum(parameter.numel() for parameter in model.parameters())}
