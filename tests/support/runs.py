"""Arguments of short runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer, ZOTrainingArguments
from hf_dpzo.models.fingerprints import fingerprint_values

from support.models import one_layer, with_lora, word_tokenizer
from support.processes import ROWS
from support.rows import few_public_rows, labelled_rows


# Arguments of a short private run of `ZOTrainer`, for tests whose fixtures outlive those of one test.
SHORT_RUN = {
    "noise_multiplier": 1.0,
    "target_delta": 1e-4,
    "expected_batch_size": 8,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def short_args(output_dir: str | Path, **changes: Any) -> ZOTrainingArguments:
    """Arguments of a private run of four steps; what is "absent" is left out."""
    settings = {
        **SHORT_RUN,
        "output_dir": str(output_dir),
        "method": "dpzero",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "smoothing": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    given = {**settings, **changes}
    return ZOTrainingArguments(**{name: value for name, value in given.items() if value != "absent"})


def train(
    output_dir: str | Path,
    *,
    model: torch.nn.Module | None = None,
    rows: Dataset | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    collator: Any = None,
    probe_rows: Sequence[Any] | None = None,
    **changes: Any,
) -> ZOTrainer:
    """Train in this process. Shapes are public, so that a row's loss has the same bits in any batch."""
    trainer = ZOTrainer(
        model=model or with_lora(one_layer()),
        args=short_args(output_dir, **{"padded_lengths": [16], "logging_steps": 100, **changes}),
        train_dataset=labelled_rows(ROWS) if rows is None else rows,
        data_collator=collator or DataCollatorWithPadding(word_tokenizer()),
        probe_rows=probe_rows or few_public_rows(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fingerprint(trainer: ZOTrainer) -> str:
    """Of the values of what was trained."""
    return fingerprint_values(p for p in trainer.model.parameters() if p.requires_grad)


def released(folder: str | Path) -> list[tuple[int, ...]]:
    """The integers of each step in a log."""
    return [tuple(record.integers) for record in Trajectory.read(folder).records]
