"""Evaluation: by losses of one row each, and tried on public rows before anything is spent."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from hf_dpzo.data.first_rows import have_several_sizes, measure_sizes
from hf_dpzo.isolation.row_generator import LABEL_COLUMNS


# The number of public rows that an evaluation is tried on: of a rare class there is one among so many.
MAX_TRIED_ROWS = 64


# What the Trainer adds to metrics that says how fast this machine is, behind a prefix.
SPEED_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class LossForward:
    """Takes the place of a model whose own loss would be evaluated, and returns another loss instead.

    `Seq2SeqTrainer.prediction_step` generates with the Trainer's model, and calls the model that it is given for the
    loss alone.

    Args:
        compute_loss: a function from the inputs to the loss.
    """

    def __init__(self, compute_loss: Callable[[Mapping[str, Any]], torch.Tensor]) -> None:
        self._compute_loss = compute_loss

    def __call__(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """Return the loss of `inputs`, as a model's outputs."""
        return {"loss": self._compute_loss(inputs)}


def refuse_missing_generation(trainer: Trainer, args: Any) -> None:
    """Raise `ValueError` if `trainer` generates, and its arguments do not say how."""
    if isinstance(trainer, Seq2SeqTrainer) and not isinstance(args, Seq2SeqTrainingArguments):
        raise ValueError(
            f"args={type(args).__name__}: Seq2SeqTrainer needs arguments of generation too; pass "
            "ZOSeq2SeqTrainingArguments."
        )


def load_first_rows(trainer: Trainer) -> Iterator[DataLoader]:
    """Yield, for each of a Trainer's evaluation data sets, a loader of its first rows, as stock would load them."""
    given = trainer.eval_dataset
    for dataset in given.values() if isinstance(given, dict) else (given,):
        collate = trainer.data_collator
        if isinstance(dataset, Dataset):
            first = dataset.select(range(min(MAX_TRIED_ROWS, len(dataset))))
            rows = list(trainer._remove_unused_columns(first, description="Evaluation"))
        else:
            rows = list(islice(iter(dataset), MAX_TRIED_ROWS))
            collate = trainer._get_collator_with_removed_columns(collate, description="Evaluation")
        yield DataLoader(rows, batch_size=trainer.args.eval_batch_size, collate_fn=collate)


def list_evaluated(trainer: Trainer) -> dict[str, Any]:
    """Return a Trainer's labelled evaluation data that can be read row by row, as the collator gets them, by name."""
    given = trainer.eval_dataset
    labels = {*LABEL_COLUMNS, *trainer.label_names}
    return {
        name: trainer._remove_unused_columns(dataset, description="evaluation")
        for name, dataset in (given if isinstance(given, dict) else {"eval_dataset": given}).items()
        if isinstance(dataset, Dataset) and labels & {*dataset.column_names}
    }


def select_alike(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows whose values have the sizes of those of the first row, which any collator can put together.

    >>> len(select_alike([{"x": [1, 2], "y": [[1], [1, 2]]}, {"x": [3, 4], "y": [[5], [6, 7]]}, {"x": [5], "y": []}]))
    2
    """
    sizes = [measure_sizes(row) for row in rows]
    return [row for row, own in zip(rows, sizes, strict=True) if own == sizes[0]]


def try_evaluation(trainer: Trainer, loader: DataLoader, *, remedy: str) -> None:
    """Evaluate what is in `loader` as `trainer` would, with its metrics, and drop the result.

    Args:
        trainer: the Trainer, whose callbacks are not told.
        loader: public rows, as the Trainer would load them.
        remedy: the advice to a user if it fails.

    Raises:
        ValueError: it fails.
    """
    if getattr(trainer.args, "predict_with_generate", False):
        # As `Seq2SeqTrainer.evaluate` sets it, each time that it is called.
        given = {"max_length": trainer.args.generation_max_length, "num_beams": trainer.args.generation_num_beams}
        trainer._gen_kwargs = {name: value for name, value in given.items() if value is not None}
    handler = trainer.callback_handler
    trainer.callback_handler = CallbackHandler([DefaultFlowCallback], trainer.model, None, None, None)
    try:
        # As `Trainer.evaluate` calls it: without metrics, only losses are needed.
        trainer.evaluation_loop(loader, "Trial", prediction_loss_only=True if trainer.compute_metrics is None else None)
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"eval_dataset: evaluating public rows raised {type(error).__name__}: {text}; nothing is spent yet: "
            f"{remedy}."
        ) from error
    finally:
        trainer.callback_handler = handler


def try_public_evaluation(
    trainer: Trainer, batches: Sequence[Sequence[Mapping[str, Any]]], *, are_made_up: bool
) -> None:
    """Evaluate public rows as `trainer` would after training, when it would be too late to fail.

    Args:
        trainer: the trainer.
        batches: batches of public rows in the format of its data, which are tried where the evaluation data are not
            public.
        are_made_up: whether these rows are made up.

    Raises:
        ValueError: it fails.
    """
    if trainer.args.eval_data_is_public or not trainer.args.private:
        for loader in load_first_rows(trainer):
            try_evaluation(trainer, loader, remedy="correct what fails on them")
        return
    remedy = "correct what fails on them, or pass probe_rows, rows of the data set's format"
    for rows in batches[:1]:
        alike = select_alike(rows) if are_made_up else rows
        error = together = _try_rows(trainer, rows, remedy)
        # If the data set's rows are all of one length, the collator need not pad; those made up have several.
        if together is not None and len(alike) < len(rows):
            error = _try_rows(trainer, alike, remedy)
            if error is None:
                _refuse_several_lengths(trainer, rows[0].keys(), together)
        if error is not None:
            raise error


def _try_rows(trainer: Trainer, rows: Sequence[Mapping[str, Any]], remedy: str) -> ValueError | None:
    """Return why evaluating `rows` as `trainer` would fails; `None` if it does not."""
    try:
        loader = DataLoader(rows, batch_size=trainer.args.eval_batch_size, collate_fn=trainer.data_collator)
        try_evaluation(trainer, loader, remedy=remedy)
    except ValueError as error:
        return error
    return None


def _refuse_several_lengths(trainer: Trainer, columns: Collection[str], together: ValueError) -> None:
    """Raise `ValueError` if evaluation rows are of several lengths, by the first of them, whichever is left out."""
    given = trainer.eval_dataset
    for name, dataset in (given if isinstance(given, dict) else {"eval_dataset": given}).items():
        if isinstance(dataset, Sized) and have_several_sizes(dataset, columns):
            raise ValueError(
                f"data_collator={name_collator(trainer.data_collator)}: public rows of several lengths, as those of "
                f"{name} are, can not be evaluated together ({type(together.__cause__).__name__}), so that evaluation "
                "would fail once everything is spent; pass one that pads them, such as "
                "DataCollatorForSeq2Seq(tokenizer) where rows have a label for each token."
            ) from together


def name_collator(collator: Any) -> str:
    """Return what a collator is called.

    >>> name_collator(len), name_collator(object())
    ('len', 'object')
    """
    return getattr(collator, "__name__", type(collator).__name__)
