"""What the losses of all heads are built from.

A loss that is reduced over the batch has no sensitivity to clip. So a head never asks the model for the model's own
loss: it takes the outputs, and reduces within each row. `losses/heads.py` chooses the loss of a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hf_dpzo.losses.calibration import Calibration
from hf_dpzo.models.unwrap import (
    Inputs,
    accepts_argument,
    count_positions,
    drop_labels,
    is_decoder,
    is_prompt_tuned,
    unwrap_model,
)


# The label of a token without a target, as everywhere in transformers.
IGNORE_INDEX = -100


# What predictions are made from: a tensor `[batch, ...]`, or several, such as those of the two ends of an answer.
Scores = torch.Tensor | tuple[torch.Tensor, ...]


class PerExampleLoss(ABC):
    """Computes one loss for each row of a micro-batch. The loss of row i depends on row i alone.

    Subclass it for a head of your own, or pass a function, which becomes a `FunctionLoss`.
    """

    # Whether a loss only changes in jumps, such as one of an argmax; `None` for a loss of which this is measured.
    is_piecewise_constant: bool | None = None
    # Whether the tokens from an invocation on, after those before it, are enough to compute the loss from.
    can_continue: bool = False
    # Whether the loss reads the last place of a batch, which must then be a row's last token.
    reads_end: bool = False
    # What is taken off the scores of label words; the log and the card of a run state it.
    calibration: Calibration | None = None

    def attach(self, model: torch.nn.Module, tokenizer: Any, progress: Callable[[], Any]) -> None:  # noqa: B027
        """Learn what the trainer knows, before it evaluates anything.

        Args:
            model: the model to be trained.
            tokenizer: the trainer's processing class; `None` if it has none.
            progress: a function that returns a copy of the trainer's state.
        """

    @abstractmethod
    def scores(self, model: torch.nn.Module, inputs: Inputs) -> Scores | None:
        """Return the scores that predictions are made from, `[batch, ...]`; `None` where there are none."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, Scores | None]:
        """Return the losses, float32 `[batch]`, and the scores; `None` in place of scores where there are none."""

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the losses alone, float32 `[batch]`."""
        return self.evaluate(model, inputs)[0]


class ScoreLoss(PerExampleLoss):
    """A per-example loss that is computed from the scores."""

    @abstractmethod
    def losses(self, scores: Scores, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, Scores]:
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
        return self.outputs(model, drop_labels(inputs)).logits.float()

    def outputs(self, model: torch.nn.Module, inputs: Inputs) -> Any:
        """Return all that the model returns for `inputs`, and for positions that leave padding out."""
        arguments = dict(inputs)
        if self._adds_positions and "attention_mask" in arguments and "position_ids" not in arguments:
            arguments["position_ids"] = count_positions(arguments["attention_mask"])
        return model(**arguments)


def find_scores(outputs: Any) -> Scores | None:
    """Return the scores in what a model returned: its logits, those of both ends of an answer, or `None`.

    Args:
        outputs: an output of transformers, a plain mapping, such as `{"logits": ...}`, or the scores themselves.

    >>> find_scores({"logits": torch.zeros(2, 3)}).shape, find_scores({"last_hidden_state": torch.zeros(2, 3)})
    (torch.Size([2, 3]), None)
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    if not isinstance(outputs, Mapping):
        return getattr(outputs, "logits", None)
    if outputs.get("logits") is not None:
        return outputs["logits"]
    ends = outputs.get("start_logits"), outputs.get("end_logits")
    return None if ends[0] is None or ends[1] is None else ends


def token_losses(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of each row's targets, float32 `[batch]`.

    It is zero for a row without targets, and NaN for one with a target that is no class, which would end the process
    on a GPU.

    Args:
        scores: the scores of the classes of each token, `[batch, tokens, classes]`.
        targets: the class of each token, `[batch, tokens]`; -100 for none.

    >>> token_losses(torch.zeros(3, 2, 2), torch.tensor([[1, -100], [-100, -100], [0, 7]])).tolist()
    [0.6931471824645996, 0.0, nan]
    """
    is_target = targets != IGNORE_INDEX
    is_class = (targets >= 0) & (targets < scores.shape[-1])
    safe = torch.where(is_class, targets, IGNORE_INDEX).long()
    losses = F.cross_entropy(scores.transpose(1, 2), safe, reduction="none", ignore_index=IGNORE_INDEX)
    means = losses.sum(dim=1) / is_target.sum(dim=1).clamp(min=1)
    return torch.where((is_target & ~is_class).any(dim=1), torch.nan, means)


def drop_padding(targets: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Return `targets`, `[batch, tokens]`, with -100 at padding, where how much there is depends on other rows."""
    mask = inputs.get("attention_mask")
    # A mask of another shape belongs to something else, such as the samples of a wave form.
    if mask is None or mask.shape != targets.shape:
        return targets
    return targets.masked_fill(mask == 0, IGNORE_INDEX)


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
    losses = F.cross_entropy(scores, torch.where(is_class, labels, 0).long(), reduction="none")
    return torch.where(is_class, losses, torch.nan)
