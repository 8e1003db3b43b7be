"""Refuses runs whose rows would fail, by what is public about model, tokenizer and rows.

A private row that fails counts as zero, and nobody may learn of it. So what can be known before is said before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, List
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_dpzo.data.collation import copy_row, get_row_signature
from hf_dpzo.data.cutting import count_tokens
from hf_dpzo.data.filler import stretch_row
from hf_dpzo.data.first_rows import find_common_facts, have_several_sizes, lacks_targets
from hf_dpzo.isolation.row_generator import LABEL_COLUMNS
from hf_dpzo.models.set_aside import find_set_aside
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.trainer.evaluation import name_collator


logger = logging.get_logger(__name__)


Evaluate = Callable[[Sequence[Mapping[str, Any]]], torch.Tensor]


# Tables of positions have a few places that no token gets, and virtual tokens may take more.
_SPARE_POSITIONS = 8


def refuse_unknown_tokens(model: torch.nn.Module, tokenizer: Any) -> None:
    """Raise `ValueError` for a tokenizer with tokens that the model does not know."""
    base = unwrap_model(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not isinstance(base, PreTrainedModel):
        return
    try:
        table = base.get_input_embeddings()
    except NotImplementedError:  # Models of images or sounds have none.
        return
    if not isinstance(table, torch.nn.Embedding):
        return
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed > table.num_embeddings:
        raise ValueError(
            f"processing_class: it has {needed} tokens and the model knows {table.num_embeddings}, so that rows with "
            f"others would contribute nothing; call model.resize_token_embeddings({needed}) before it is trained."
        )


def refuse_undeclared_classes(model: torch.nn.Module, dataset: Any) -> None:
    """Raise `ValueError` if the data set states more classes than the model's head has outputs."""
    base = unwrap_model(model)
    if not isinstance(dataset, Dataset) or not any(
        kind.__name__.endswith("Classification") for kind in type(base).__mro__
    ):
        return
    for name in LABEL_COLUMNS:
        feature = dataset.features.get(name)
        feature = feature.feature if isinstance(feature, List) else feature
        if isinstance(feature, ClassLabel) and feature.num_classes > base.config.num_labels > 1:
            raise ValueError(
                f"{name}: the data state {feature.num_classes} classes and the model has {base.config.num_labels} "
                "outputs, so that rows of the others would contribute nothing; load the model with "
                f"num_labels={feature.num_classes}."
            )


def refuse_missing_targets(dataset: Any) -> None:
    """Raise `ValueError` if nothing is learned from any of the first rows but one at most."""
    if find_common_facts(dataset).lack_targets:
        raise ValueError(
            "train_dataset: its first rows have no targets, since all of their labels are -100, and nothing would be "
            "learned; check the chat template's mask of the assistant's tokens, or what sets labels."
        )


def refuse_missing_positions(
    model: torch.nn.Module, evaluate: Evaluate, rows: Sequence[Mapping[str, Any]], length: int
) -> None:
    """Raise `ValueError` if the model fails on rows of `length` tokens, because it has no positions for them.

    Args:
        model: the model as it is trained.
        evaluate: a function from public rows to their losses.
        rows: public rows, which are stretched.
        length: a length that rows are known to have. The message does not show it.
    """
    if not has_few_positions(model, length):
        return
    reason = None
    try:
        evaluate([stretch_row(dict(rows[0]), length)])
    except Exception as error:
        reason = type(error).__name__
    if reason is not None:
        limit = getattr(getattr(unwrap_model(model), "config", None), "max_position_embeddings", "few")
        raise ValueError(
            f"max_position_embeddings={limit}: the model fails on a made-up row as long as those of the run "
            f"({reason}), and they would contribute nothing; cut them when they are tokenized, by max_length and "
            "truncation=True, or lower padded_lengths."
        )


def has_few_positions(model: torch.nn.Module, length: int) -> bool:
    """Return whether the model has a table of positions that may be too small for `length` tokens."""
    reader = find_set_aside(model) or model
    tables = (
        module.num_embeddings
        for name, module in reader.named_modules()
        if isinstance(module, torch.nn.Embedding) and any(part in name.rpartition(".")[2] for part in ("pos", "wpe"))
    )
    return any(places < length + _SPARE_POSITIONS for places in tables)


def warn_of_rows_alone(collate: Callable, rows: Sequence[Mapping[str, Any]], dataset: Any) -> None:
    """Warn of a collator that does not pad, where rows are of several lengths, so that each is evaluated alone.

    Args:
        collate: the collator.
        rows: public rows of several lengths.
        dataset: the training rows, of which the first ones tell whether they are of several lengths.
    """
    fails = _try_collating(collate, rows)
    if fails is None or any(_try_collating(collate, [row]) for row in rows) or not have_several_sizes(dataset, rows[0]):
        return
    logger.warning(
        f"data_collator={name_collator(collate)}: it can not put rows of several lengths together ({fails}), so that "
        "each is evaluated alone, which takes several times as long; pass one that pads them, such as "
        "DataCollatorForSeq2Seq(tokenizer) where rows have a label for each token."
    )


def _try_collating(collate: Callable, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why `collate` fails on public rows; `None` if it does not."""
    try:
        collate([copy_row(row) for row in rows])
    except Exception as error:
        return type(error).__name__
    return None


def find_public_length(dataset: Any, padded_lengths: Sequence[int] | None) -> int:
    """Return the largest number of tokens that rows are known to have, by what is stated or by the first rows."""
    if padded_lengths:
        return padded_lengths[-1]
    return find_common_facts(dataset).least_tokens


def refuse_failing_rows(name: str, dataset: Any, evaluate: Evaluate) -> None:
    """Raise `ValueError` if public rows fail in the model or its loss; the message counts them.

    Tried are the rows at the extremes: of the most and the fewest tokens, of the largest and smallest token and label,
    and one of each form. Where one of them fails, all are tried.

    Args:
        name: what the rows are, for messages.
        dataset: the rows, which are public.
        evaluate: a function from public rows to their losses.
    """
    if len(dataset) and all(lacks_targets(row) for row in _iterate(dataset)):
        raise ValueError(
            f"{name}: none of its {len(dataset)} rows has a target, since all of their labels are -100, so that "
            "its loss would be 0; check what sets labels."
        )
    if all(_try(evaluate, row) is None for row in _find_extremes(dataset).values()):
        return
    failures = [(index, reason) for index, row in enumerate(_iterate(dataset)) if (reason := _try(evaluate, row))]
    if failures:
        index, reason = failures[0]
        raise ValueError(
            f"{name}: {len(failures)} of its {len(dataset)} rows fail in the model or its loss, first row {index} "
            f"({reason}), and such rows would contribute nothing to training; correct them there and in train_dataset."
        )


def _iterate(dataset: Any) -> Iterator[Mapping[str, Any]]:
    return (dataset[index] for index in range(len(dataset)))


def _try(evaluate: Evaluate, row: Mapping[str, Any]) -> str | None:
    """Return why a public row fails; `None` if it does not."""
    try:
        losses = evaluate([row])
    except Exception as error:
        return type(error).__name__
    return None if bool(torch.isfinite(losses).all()) else "its loss is not finite"


def _find_extremes(dataset: Any) -> dict[Any, Mapping[str, Any]]:
    """Return the rows that are extreme in some way, by the way."""
    found: dict[Any, Mapping[str, Any]] = {}
    largest: dict[Any, float] = {}
    for row in _iterate(dataset):
        found.setdefault(get_row_signature(row), row)
        for way, size in _measure(row).items():
            if size > largest.get(way, -float("inf")):
                largest[way], found[way] = size, row
    return found


def _measure(row: Mapping[str, Any]) -> dict[Any, float]:
    """Return how large a row is in each way in which a row may be extreme."""
    tokens = count_tokens(row)
    sizes = {"longest": tokens, "shortest": -tokens}
    for name in ("input_ids", *LABEL_COLUMNS, "start_positions", "end_positions"):
        values = _flatten(row.get(name))
        if values:
            sizes |= {(name, "largest"): max(values), (name, "smallest"): -min(values)}
    return sizes


def _flatten(value: Any) -> list[float]:
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    if isinstance(value, list | tuple):
        return [number for item in value for number in _flatten(item)]
    return [value] if isinstance(value, int | float) else []
