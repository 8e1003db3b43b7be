"""Evaluates a trained model on labelled rows, by the code that evaluates in training."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.recipe.loading import encode_table, load_rows
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.trainer.evaluation import SPEED_METRICS
from hf_dpzo.trainer.trainer import ZOTrainer


def evaluate_rows(
    rows: Any,
    *,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    loss: PerExampleLoss,
    batch_size: int,
) -> dict[str, float]:
    """Return the metrics of `rows`, by the names that the run shows them by, without its prefix.

    Args:
        rows: the path of a file, a `datasets.Dataset`, or mappings, with labels.
        model: the model.
        tokenizer: its tokenizer.
        recipe: the recipe of its run.
        loss: the loss of its run.
        batch_size: the number of rows that are computed at once.

    Raises:
        ValueError: the rows can not be read.
    """
    encoded = _encode(rows, recipe, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        args = ZOTrainingArguments(
            output_dir=scratch,
            method="mezo",
            expected_batch_size=1,
            max_steps=1,
            per_device_eval_batch_size=batch_size,
            use_cpu=next(model.parameters()).device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = ZOTrainer(
            model=model,
            args=args,
            eval_dataset=encoded,
            processing_class=tokenizer,
            data_collator=recipe.kind.build_collator(tokenizer, model),
            compute_metrics=recipe.kind.compute_metrics,
            per_example_loss=loss,
        )
        trainer.remove_callback(PrinterCallback)
        metrics = trainer.evaluate()
    named = {name.removeprefix("eval_"): value for name, value in metrics.items() if name != "epoch"}
    return {**{name: value for name, value in named.items() if name not in SPEED_METRICS}, "rows": len(encoded)}


def _encode(rows: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    if isinstance(rows, str | Path):
        return load_rows(replace(recipe, data=str(rows), data_config=None, train_split="train"), tokenizer)[0]
    if isinstance(rows, pd.DataFrame):
        rows = rows.to_dict("records")
    table = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list([dict(row) for row in rows])
    return encode_table(table, recipe, tokenizer)
