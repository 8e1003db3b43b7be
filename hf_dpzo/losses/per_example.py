"""What the losses of all heads are built from.

A loss that is reduced over the batch has no sensitivity to clip. So a head never asks the model for the model's own
loss: it takes the outputs, and reduces within each row. `losses/heads.py` chooses the loss of a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from hf_dpzo.models.unwrap import Inputs, accepts_argument, drop_labels, is_decoder, is_prompt_tuned, unwrap_model


class PerExampleLoss(ABC):
    """Computes one loss for each row of a micro-batch. The loss of row i depends on row i alone.

    Subclass it for a head of your own, or pass a function, which becomes a `FunctionLoss`.
    """

    # Whether a loss only changes in jumps, such as one of an argmax; `None` for a loss of which this is measured.
    is_piecewise_constant: bool | None = None

    def attach(self, model: torch.nn.Module, tokenizer: Any, progress: Callable[[], Any]) -> None:  # noqa: B027
        """Learn what the trainer knows, before it evaluates anything.

        Args:
            model: the model to be trained.
            tokenizer: the trainer's processing class; `None` if it has none.
            progress: a function that returns a copy of the trainer's state.
        """

    @abstractmethod
    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the scores that predictions are made from, `[batch, ...]`."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses, float32 `[batch]`, and the scores."""

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the losses alone, float32 `[batch]`."""
        return self.evaluate(model, inputs)[0]


class ScoreLoss(PerExampleLoss):
    """A per-example loss that is computed from the scores."""

    @abstractmethod
    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses, float32 `[batch]`, and the scores from which they are computed."""
        scores = self.scores(model, inputs)
        return self.losses(scores, inputs), scores


class ForwardPass:
    """Calls a model without labels, and with positions that do not depend on padding.

    With labels, a model would compute its own loss over the batch. Without positions, a decoder counts left padding as
    tokens, and a long row would move the losses of the short rows beside it.

    Args:
        model: the model to be called, with or without an adapter.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        base = unwrap_model(model)
        # A prompt-tuned model computes its positions itself.
        self._adds_positions = (
            is_decoder(base) and accepts_argument(base, "position_ids") and not is_prompt_tuned(model)
        )

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the model's logits, in float32."""
        arguments = drop_labels(inputs)
        if self._adds_positions and "attention_mask" in arguments and "position_ids" not in arguments:
            arguments["position_ids"] = (arguments["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return model(**arguments).logits.float()


def class_losses(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each row, float32 `[batch]`; NaN where the label is not a class.

    Without the check, such a label would end the process on a GPU.

    Args:
        scores: the scores of the classes, `[batch, classes]`.
        labels: the class of each row, `[batch]`.

    >>> class_losses(torch.zeros(2, 2), torch.tensor([1, 7])).isnan().tolist()
    [False, True]
    """
    is_class = (labels >= 0) & (labels < scores.shape[-1])
    losses = F.cross_entropy(scores, torch.where(is_class, labels, 0), reduction="none")
    return torch.where(is_class, losses, torch.nan)
