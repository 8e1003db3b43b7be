"""Activated LoRA on a tiny causal language model, and rows with its invocation."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import DataCollatorForSeq2Seq

from hf_dpzo import ZOTrainer, seeded_peft_model
from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.suffix import SuffixRule
from hf_dpzo.step.batch_losses import BatchLosses

from support.models import causal_lm, word_tokenizer
from support.runs import short_args


INVOCATION = [46, 47]


def alora(**changes) -> LoraConfig:
    settings = {"task_type": TaskType.CAUSAL_LM, "r": 2, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**{**settings, "alora_invocation_tokens": INVOCATION, **changes})


def activated_model(base: torch.nn.Module | None = None, **changes) -> torch.nn.Module:
    return seeded_peft_model(base or causal_lm(num_hidden_layers=1), alora(**changes), seed=3)


@functools.cache
def activated_rows(count: int, seed: int = 0, *, without: frozenset[int] = frozenset()) -> Dataset:
    """Rows of a prompt, the invocation, and two tokens that are learned; the numbers in `without` lack a part of it."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        invocation = INVOCATION[:1] if number in without else INVOCATION
        prompt = [draw.randrange(4, 44) for _ in range(draw.randrange(2, 8))]
        ids = [*prompt, *invocation, *(draw.randrange(4, 44) for _ in range(2))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return Dataset.from_list(rows)


def right_collator() -> DataCollatorForSeq2Seq:
    tokenizer = word_tokenizer().__class__(
        tokenizer_object=word_tokenizer().backend_tokenizer, pad_token="[PAD]", eos_token="[EOS]", padding_side="right"
    )
    return DataCollatorForSeq2Seq(tokenizer)


def activated_losses(model, loss, *, collate=None, **changes) -> BatchLosses:
    """The losses of logical batches, in micro-batches of four."""
    rule = SuffixRule(invocation=tuple(INVOCATION), ends_together=loss.reads_end)
    settings = {"micro_batch_size": 4, "suffix_rule": rule, **changes}
    return BatchLosses(
        loss=loss,
        collator=LogicalBatchCollator(collate=collate or right_collator(), **settings),
        prepare=lambda inputs: inputs,
        device=torch.device("cpu"),
        invocation=tuple(INVOCATION),
    )


def train_activated(
    output_dir: str | Path, *, rows: Dataset, make: Callable[[], torch.nn.Module] | None = None, **changes: Any
) -> ZOTrainer:
    """Train in this process, in public shapes."""
    args = short_args(output_dir, **{"padded_lengths": [16], "logging_steps": 100, **changes})  # They join processes.
    trainer = ZOTrainer(
        model=(make or activated_model)(),
        args=args,
        train_dataset=rows,
        data_collator=right_collator(),
    )
    trainer.train()
    return trainer
