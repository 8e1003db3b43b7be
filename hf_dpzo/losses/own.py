"""The loss that a model computes itself, for heads that have no file here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_dpzo.losses.per_example import ForwardPass, PerExampleLoss, Scores, find_scores
from hf_dpzo.models.unwrap import Inputs, unwrap_model


class OwnLoss(PerExampleLoss):
    """The loss that the model returns for a row alone.

    The model averages over what it is called with, so it is called with one row at a time, which takes longer than a
    batch. The rows keep the padding of their batch; the isolation probe finds where that moves a loss.

    Args:
        model: a model that returns a loss for inputs with labels, as the stock Trainer asks of one.

    Raises:
        ValueError: the model returns no loss, or its inputs do not show which part belongs to which row.

    >>> class Squares(torch.nn.Module):
    ...     def forward(self, x, labels):
    ...         return {"loss": (x - labels).square().mean(), "logits": x}
    >>> loss = OwnLoss(Squares())
    >>> loss(Squares(), {"x": torch.tensor([[3.0], [1.0]]), "labels": torch.tensor([[1.0], [1.0]])})
    tensor([4., 0.])
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> Scores | None:
        """Return the scores of all rows; `None` where the model returns none."""
        return find_scores(self._forward.outputs(model, inputs))

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, Scores | None]:
        """Return the losses, float32 `[batch]`, and the scores; `None` where the model returns none."""
        outputs = [self._evaluate_row(model, row) for row in split_rows(inputs)]
        return torch.stack([loss for loss, _ in outputs]), _join([scores for _, scores in outputs])

    def _evaluate_row(self, model: torch.nn.Module, row: Inputs) -> tuple[torch.Tensor, Scores | None]:
        with _kept_configuration(model):
            outputs = self._forward.outputs(model, row)
        loss = _find_loss(outputs)
        if loss is None:
            raise ValueError(
                f"model={type(unwrap_model(model)).__name__}: it returned no loss for a row with labels; pass "
                "per_example_loss, a function (model, inputs) that returns one loss for each row, shape [batch]."
            )
        # A tuple holds the loss and then the scores, as the stock Trainer reads it.
        is_tuple = type(outputs) is tuple
        return loss.float().reshape(()), find_scores(outputs[1] if is_tuple and len(outputs) > 1 else outputs)


def split_rows(inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Yield the inputs of each row of a batch by itself, with its padding.

    Raises:
        ValueError: an input has another number of parts than the batch has rows.

    >>> [row["x"].tolist() for row in split_rows({"x": torch.tensor([[1, 2], [3, 4]]), "return_dict": True})]
    [[[1, 2]], [[3, 4]]]
    """
    parts = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor | list | tuple)}
    parts = {name: value for name, value in parts.items() if not isinstance(value, torch.Tensor) or value.ndim}
    sizes = {name: len(value) for name, value in parts.items()}
    batch = next(iter(sizes.values()), 0)
    odd = next((name for name, size in sizes.items() if size != batch), None)
    if odd is not None:
        raise ValueError(
            f"inputs={odd}: its first dimension does not count rows, so that they cannot be told apart; pass "
            "per_example_loss."
        )
    for row in range(batch):
        yield {**inputs, **{name: value[row : row + 1] for name, value in parts.items()}}


def _find_loss(outputs: Any) -> torch.Tensor | None:
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, tuple):
        return outputs[0]
    return getattr(outputs, "loss", None)


def _join(scores: Sequence[Scores | None]) -> Scores | None:
    """Return the scores of all rows in one; `None` if a row has none, or if they do not fit together."""
    if not scores or any(part is None for part in scores):
        return None
    if isinstance(scores[0], tuple):
        joined = tuple(_join(parts) for parts in zip(*scores, strict=True))
        return None if any(part is None for part in joined) else joined
    if len({part.shape[1:] for part in scores}) > 1:
        return None
    return torch.cat(list(scores))


@contextmanager
def _kept_configuration(model: torch.nn.Module) -> Iterator[None]:
    """Put the configuration back afterwards: the labels of one row would decide the kind of problem of the next."""
    base = unwrap_model(model)
    if not isinstance(base, PreTrainedModel):
        yield
        return
    config = base.config
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)
