"""Refuses what would break the claim, or be silently ignored, before any data are touched.

Every message is one sentence: the value, the reason, the remedy.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    TrainingArguments,
)
from transformers.integrations import WandbCallback

from hf_dpzo.arguments.unsupported import METRIC_SCHEDULERS
from hf_dpzo.data.checks import refuse_rows
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.models.history import find_runs, is_marked_as_trained
from hf_dpzo.step.descent import is_copied


def refuse_parts(*, dataset: Any, data_collator: Any, callbacks: Iterable[Any], args: Any) -> None:
    """Raise `ValueError` for parts handed to the trainer that would break the claim or be ignored."""
    if dataset is not None:
        refuse_rows(dataset, private=args.private, unit_column=args.privacy_unit_column)
    if isinstance(data_collator, DataCollatorWithFlattening):
        raise ValueError(
            "data_collator=DataCollatorWithFlattening: it joins the rows of a batch; use a padding collator."
        )
    if isinstance(data_collator, DataCollatorForLanguageModeling) and data_collator.mlm:
        raise ValueError(
            "data_collator=DataCollatorForLanguageModeling: its random masks make one row depend on the others; mask "
            "rows once, when they are tokenized."
        )
    kinds = {callback if isinstance(callback, type) else type(callback) for callback in callbacks}
    watched = os.environ.get("WANDB_WATCH")
    watches = watched in ("all", "parameters") and any(issubclass(kind, WandbCallback) for kind in kinds)
    if watches and args.private:
        raise ValueError(
            f"WANDB_WATCH={watched}: it counts forward passes, whose number follows the sizes of batches; unset it."
        )
    stops_early = any(issubclass(kind, EarlyStoppingCallback) for kind in kinds)
    if stops_early and args.private and not args.eval_data_is_public:
        raise ValueError(
            "callbacks=EarlyStoppingCallback: it lets the evaluation data end the run; set eval_data_is_public=True if "
            "they are."
        )


def refuse_replaced_parts(compute_loss_func: Any, optimizers: tuple, optimizer_class: Any = None) -> None:
    """Raise `ValueError` for parts of the stock Trainer that zeroth-order training replaces."""
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: it returns one number for a batch; pass per_example_loss, which returns one for each."
        )
    if any(part is not None for part in optimizers):
        raise ValueError(
            "optimizers: the update is made by ZOOptimizer; set learning_rate and lr_scheduler_type instead."
        )
    if optimizer_class is not None:
        raise ValueError(
            "optimizer_cls_and_kwargs: the update is made by ZOOptimizer; set update, and learning_rate, instead."
        )


def refuse_changed_arguments(args: Any, planned: Mapping[str, Any]) -> None:
    """Raise `ValueError` where `args` no longer hold the values that a budget was planned from."""
    for name, value in planned.items():
        current = getattr(args, name)
        if current != value:
            raise ValueError(f"{name}={current}: the budget was planned with {name}={value}; make a new trainer.")


def refuse_large_copies(model: torch.nn.Module, points_per_pass: int | None) -> None:
    """Raise `ValueError` where several probe points at once would need as many copies of much of the model."""
    if points_per_pass is not None and not is_copied(model, [p for p in model.parameters() if p.requires_grad]):
        raise ValueError(
            f"points_per_pass={points_per_pass}: more than a tenth of the model is trained, and each point would be a "
            "copy of that; remove it, or train an adapter."
        )


def refuse_resuming(args: TrainingArguments) -> None:
    """Raise `ValueError` where a log does not hold all that a resumed run would need."""
    if args.lr_scheduler_type in METRIC_SCHEDULERS:
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value}: it depends on evaluations, which a log does not hold; "
            "start a new run, or choose a schedule of the steps alone."
        )


def refuse_trained_model(model: torch.nn.Module, *, counted: Collection[str] = ()) -> None:
    """Raise `ValueError` for a model that a run of this process has trained, or that holds what one has led to.

    Args:
        model: the model that a run is about to begin with.
        counted: the names of the logs of earlier runs that the new one counts.
    """
    runs = find_runs(model)
    if (is_marked_as_trained(model) and not runs) or not runs <= {*counted}:
        raise ValueError(
            "model: another run has trained it, and a card counts one; load the model anew, or name the folder of that "
            "run in earlier_runs, so that epsilon covers it too."
        )


# Arguments that steer the training loop.
SETTINGS = (
    "parallel",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "logging_strategy",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "audit",
    "canaries",
    "load_best_model_at_end",
    "push_to_hub",
)


def refuse_differing_settings(processes: Processes, args: TrainingArguments) -> None:
    """Raise in all processes where their settings of the training loop differ.

    A process that evaluates or saves while another one takes a step would wait for ever.

    Raises:
        ValueError: the settings differ.
    """
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    digest = int.from_bytes(hashlib.sha256(str(settings).encode()).digest()[:8], "big") >> 1
    if not processes.all_equal(digest):
        raise ValueError(
            f"args: the {processes.size} processes do not have the same {', '.join(SETTINGS[:3])} or other settings of "
            "the loop; launch all with the same arguments."
        )
