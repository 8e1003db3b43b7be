"""Models that `fully_shard` splits over the processes of a job, and runs of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from hf_dpzo import ZOTrainer

from support.models import classifier, with_lora, word_tokenizer
from support.processes import ROWS, Here
from support.rows import few_public_rows, labelled_rows
from support.runs import short_args


def whole_model(*, lora: bool = False) -> torch.nn.Module:
    """The same classifier each time."""
    torch.manual_seed(0)
    return with_lora(classifier()) if lora else classifier()


def split(model: torch.nn.Module, mesh: DeviceMesh | None = None) -> torch.nn.Module:
    """Split each layer for itself, and the rest with the root."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def texts(count: int = ROWS) -> Dataset:
    """Rows for causal language models."""
    return Dataset.from_list([{**row, "labels": row["input_ids"]} for row in labelled_rows(count)])


def run(
    make: Callable[[], torch.nn.Module],
    folder: Path,
    *,
    rows: Dataset | None = None,
    resume: bool = False,
    callbacks: tuple = (),
    eval_dataset: Dataset | None = None,
    **changes: Any,
) -> ZOTrainer:
    """Train the model that `make` makes, in this process, which is one of those of the run."""
    args = short_args(folder, **{"padded_lengths": [16], "logging_steps": 100, **changes})  # Which joins the processes.
    trainer = ZOTrainer(
        model=make(),
        args=args,
        train_dataset=labelled_rows(ROWS) if rows is None else rows,
        eval_dataset=eval_dataset,
        data_collator=(DataCollatorWithPadding if rows is None else DataCollatorForSeq2Seq)(word_tokenizer()),
        probe_rows=few_public_rows() if rows is None else texts(2).to_list(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_of(here: Here, make: Callable[[], torch.nn.Module], folder: Path, **changes: Any) -> ZOTrainer:
    """As `run`, of a model that is split where there are several processes."""
    return run(make if here.size == 1 else lambda: split(make()), folder, **changes)
