"""The loss that a user's own function computes."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from hf_dpzo.losses.per_example import PerExampleLoss, Scores, find_scores
from hf_dpzo.models.unwrap import Inputs, drop_labels


logger = logging.get_logger(__name__)


class FunctionLoss(PerExampleLoss):
    """Wraps any function `(model, inputs) -> [batch]`, differentiable or not.

    Its scores are the logits of the function's own forward pass, if it makes exactly one, and else those that the loss
    of the model's head has. Where that has none either, there are no scores, and the losses alone are evaluated.

    Args:
        fn: the function, in whose result the loss of a row must depend on that row alone.
        head_loss: the loss of the model's head; `None` for a head that is not known.

    >>> loss = FunctionLoss(lambda model, inputs: model(inputs["x"]).square().sum(dim=1))
    >>> loss(torch.nn.Identity(), {"x": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
    tensor([25.,  1.])
    """

    def __init__(
        self, fn: Callable[[torch.nn.Module, Inputs], torch.Tensor], head_loss: PerExampleLoss | None = None
    ) -> None:
        self.fn = fn
        self._head_loss = head_loss
        # Whether an attempt to compute scores beside the function has failed.
        self._has_no_scores = False

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> Scores | None:
        """Return the scores of the model's head, or its logits; `None` where these cannot be computed."""
        if self._has_no_scores:
            return None
        try:
            if self._head_loss is not None:
                return self._head_loss.scores(model, inputs)
            return find_scores(model(**drop_labels(inputs)))
        except Exception as error:  # The inputs are the function's, and it may call the model in its own way.
            self._has_no_scores = True
            logger.warning(
                f"per_example_loss: the model gives no scores for its inputs ({type(error).__name__}), so that the "
                "losses alone are evaluated; pass a PerExampleLoss with scores to have predictions too."
            )
            return None

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, `[batch]`, as the function computes it."""
        return _as_floats(self.fn(model, inputs))

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, Scores | None]:
        """Return the losses, float32 `[batch]`, and the scores; `None` where there are none."""
        found: list[Scores | None] = []

        def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
            found.append(find_scores(output))

        handle = model.register_forward_hook(keep) if isinstance(model, torch.nn.Module) else None
        try:
            losses = _as_floats(self.fn(model, inputs))
        finally:
            if handle is not None:
                handle.remove()
        (scores,) = found if len(found) == 1 else (None,)
        return losses, scores if _fits(scores, losses) else self.scores(model, inputs)


def _as_floats(losses: Any) -> Any:
    """Return losses that are whole numbers or truth values as float32, and anything else as it is."""
    is_exact = isinstance(losses, torch.Tensor) and not losses.is_floating_point()
    return losses.float() if is_exact else losses


def _fits(scores: Scores | None, losses: torch.Tensor) -> bool:
    """Return whether there are scores, and for as many rows as losses."""
    tensors = scores if isinstance(scores, tuple) else (scores,)
    # A loss may have kept the output layer from computing anything.
    return all(
        isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.shape[:1] == losses.shape[:1]
        for tensor in tensors
    )
