"""Tries rows before a run without privacy: errors are withheld there too, so that it would train on none in silence."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hf_dpzo.isolation.measure import Rows
from hf_dpzo.isolation.probe import FailedLossError


# The number of training rows that are tried.
TRIED_ROWS = 8


Evaluate = Callable[[Rows], torch.Tensor]


def read_first_rows(dataset: Any, *, dropped_column: str | None) -> Rows:
    """Return the first rows of `dataset`, which are public where nothing is private, as a collator receives them.

    Raises:
        FailedLossError: none of them can be read.
    """
    rows, errors = [], []
    for index in range(min(TRIED_ROWS, len(dataset))):
        try:
            row = dataset[index]
        except Exception as error:
            errors.append(error)
            continue
        is_named = isinstance(row, Mapping)
        rows.append({name: row[name] for name in row if name != dropped_column} if is_named else row)
    if errors and not rows:
        raise _build_error("reading", errors) from errors[0]
    return rows


def choose_tried_rows(evaluate: Evaluate, batches: Sequence[Rows], first_rows: Rows) -> list[Rows]:
    """Return batches on which the losses can be computed: `batches` of public rows, or else one of training rows.

    Nothing says that rows which are made up suit a loss. The training rows must.

    Args:
        evaluate: a function from rows to their losses, `[rows]`, in which errors are raised.
        batches: batches of public or of made-up rows.
        first_rows: the first training rows.

    Raises:
        FailedLossError: none of the training rows has a finite loss; the message says why.
    """
    fitting, errors = [], []
    for row in first_rows:
        error = _try(evaluate, [row])
        (fitting if error is None else errors).append(row if error is None else error)
    if errors and not fitting:
        raise _build_error("evaluating", errors) from errors[0]
    error = next(filter(None, (_try(evaluate, rows) for rows in batches)), None)
    if error is None and batches:
        return list(batches)
    if error is not None and not fitting:
        raise _build_error("evaluating", [error]) from error
    return [fitting] if fitting else []


def _try(evaluate: Evaluate, rows: Rows) -> Exception | None:
    """Return why the losses of `rows` cannot be computed; `None` if they can."""
    try:
        losses = evaluate(rows)
    except Exception as error:
        return error
    return None if bool(losses.isfinite().any()) else ValueError("the loss is not finite")


def _build_error(action: str, errors: Sequence[Exception]) -> FailedLossError:
    text = " ".join(str(errors[0]).split()).rstrip(".")
    return FailedLossError(
        f"train_dataset: {action} each of its first {len(errors)} rows raised {type(errors[0]).__name__}: {text}; "
        "correct the rows, the loss or the collator, without which nothing would be trained."
    )
