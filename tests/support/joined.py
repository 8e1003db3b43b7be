"""Short runs of the ready classes of `hf_dpzo.trl`."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import Trainer

from hf_dpzo.trl import ZODPOConfig, ZODPOTrainer, ZORewardConfig, ZORewardTrainer, ZOSFTConfig, ZOSFTTrainer

from support.models import causal_lm, classifier, word_tokenizer
from support.runs import SHORT_RUN


READY = {
    "sft": (ZOSFTTrainer, ZOSFTConfig),
    "reward": (ZORewardTrainer, ZORewardConfig),
    "dpo": (ZODPOTrainer, ZODPOConfig),
}
SETTINGS = {**SHORT_RUN, "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}


def lora() -> LoraConfig:
    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"])


def model_of(name: str, **changes) -> torch.nn.Module:
    return classifier(num_labels=1, **changes) if name == "reward" else causal_lm(**changes)


def rows_of(name: str, count: int, *, first: int = 0) -> Dataset:
    """Texts, or pairs of texts, of different lengths."""
    rows = []
    for i in range(first, first + count):
        prompt, chosen, rejected = f"w{i % 40} w{i % 7} ", f"w{i % 5} good", "bad " * (1 + i % 3) + f"w{i % 11}"
        answers = {"completion": chosen} if name == "sft" else {"chosen": chosen, "rejected": rejected}
        rows.append({"prompt": prompt, **answers})
    return Dataset.from_list(rows)


def build(name: str, folder: str | Path, *, model=None, rows=None, args=None, **changes) -> Trainer:
    """Build a trainer; `args` are changes of its arguments."""
    kind, config = READY[name]
    parts = {"train_dataset": rows_of(name, 24) if rows is None else rows, "eval_dataset": rows_of(name, 6, first=24)}
    return kind(
        model=model_of(name) if model is None else model,
        args=config(str(folder), **{**SETTINGS, **(args or {})}),
        processing_class=word_tokenizer(),
        **{**parts, **changes},
    )
