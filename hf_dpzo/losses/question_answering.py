"""The loss of a head that finds where an answer begins and ends in a text."""

import torch
import torch.nn.functional as F

from hf_dpzo.losses.per_example import ForwardPass, ScoreLoss
from hf_dpzo.models.unwrap import Inputs


POSITIONS = ("start_positions", "end_positions")


class QuestionAnsweringLoss(ScoreLoss):
    """The mean of two cross-entropies over a row's own tokens: of the answer's first token, and of its last.

    Transformers also compares with the scores at padding, so that a row's loss depends on the longest row of its batch;
    here padding takes no part. As there, a position before the first token is the first token, and one behind the
    row's last token counts as zero.

    Args:
        model: a model with a head for extractive question answering.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the first and of the last token of the answer, each float32 `[batch, tokens]`."""
        given = {name: value for name, value in inputs.items() if name not in POSITIONS}
        outputs = self._forward.outputs(model, given)
        tokens = inputs["input_ids"].shape[1]
        # The virtual tokens of prompt tuning stand in front and are no answers.
        return outputs.start_logits[:, -tokens:].float(), outputs.end_logits[:, -tokens:].float()

    def losses(self, scores: tuple[torch.Tensor, torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        mask = inputs.get("attention_mask")
        start, end = (
            _position_losses(logits, inputs[name], mask) for logits, name in zip(scores, POSITIONS, strict=True)
        )
        return (start + end) / 2


def _position_losses(logits: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the cross-entropy of each row's position among its own tokens; zero for one that is not among them."""
    own = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.bool()
    positions = positions.reshape(len(logits), 1).clamp(min=0)
    inside = positions < logits.shape[1]
    safe = torch.where(inside, positions, 0).long()
    counts = (inside & own.gather(1, safe)).squeeze(1)
    losses = F.cross_entropy(logits.masked_fill(~own, -torch.inf), safe.squeeze(1), reduction="none")
    return torch.where(counts, losses, 0)
