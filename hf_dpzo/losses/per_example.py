"""One loss for each example, in float32: what the loss of every kind of head is built from.

A loss that is reduced over the batch has no sensitivity to clip. So none of these ever asks the model for its own loss:
they take its outputs, and reduce within each row by itself. `losses/heads.py` says which loss a model gets.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from hf_dpzo.models.unwrap import Inputs, accepts_argument, drop_labels, is_decoder, is_prompt_tuned, unwrap_model


class PerExampleLoss(ABC):
    """One loss for each row of a micro-batch; row i's depends on row i alone.

    Subclass it for a head of your own, or pass a function, which becomes a `FunctionLoss`.
    """

    @abstractmethod
    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """What predictions are made from, `[batch, ...]`."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses, float32 `[batch]`, and the scores."""

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The losses alone."""
        return self.evaluate(model, inputs)[0]


class ScoreLoss(PerExampleLoss):
    """A loss that is computed from the scores."""

    @abstractmethod
    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One loss for each row, float32 `[batch]`."""

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses `[batch]`, and the scores that they come from."""
        scores = self.scores(model, inputs)
        return self.losses(scores, inputs), scores


class ForwardPass:
    """Calls a model without labels, and with positions that do not depend on how far a row was padded.

    With labels, a model would compute its own loss over the batch. Without positions, a decoder counts left padding as
    tokens, and a long row would move the losses of the short rows beside it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        base = unwrap_model(model)
        # Prompt tuning computes positions of its own.
        self._positions = is_decoder(base) and accepts_argument(base, "position_ids") and not is_prompt_tuned(model)

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The logits, float32."""
        given = drop_labels(inputs)
        if self._positions and "attention_mask" in given and "position_ids" not in given:
            given["position_ids"] = (given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return model(**given).logits.float()


def class_losses(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row, `[batch]`; NaN for a label that is no class, which on a GPU would end the process.

    >>> class_losses(torch.zeros(2, 2), torch.tensor([1, 7])).isnan().tolist()
    [False, True]
    """
    known = (labels >= 0) & (labels < scores.shape[-1])
    losses = F.cross_entropy(scores, torch.where(known, labels, 0), reduction="none")
    return torch.where(known, losses, torch.nan)
