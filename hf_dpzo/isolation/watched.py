"""Losses that change in jumps, such as those of an argmax: rounding leaves them where they are until one flips.

That such a loss did not move shows nothing. What must not move is what it is computed from.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from hf_dpzo.distributed.checksums import checksum
from hf_dpzo.isolation.trace import iterate_tensors
from hf_dpzo.losses.output_layer import find_output_layer
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.unwrap import Inputs, unwrap_model
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.zo.directions import Gaussian
from hf_dpzo.zo.shift import shifted


# A digest of this many bits is exact in float32, and at this scale far below what counts as a coupled row.
_BITS = 24
_SCALE = 2.0**-38


# A shift of each weight that moves every loss that is continuous by more than it rounds.
TINY_SHIFT = 1e-5


# A shift away from where parameters are zero, such as those of a new adapter.
START = 0.05


# Shifts at which an argmax flips, if anything makes it flip. Each is four of the last, so that a loss that moves, but
# that is rounded to fewer places than a tiny shift reaches, is first seen to change by no more than a few roundings.
LARGE_SHIFTS = (*(TINY_SHIFT * 4.0**k for k in range(1, 9)), 1.0)


# The smallest change of a loss that is a jump, as a share of it.
LEAST_JUMP = 1e-4


# A loss below this is taken for this: one that nearly vanishes is rounded as the scores are from which it comes.
LEAST_LOSS = 0.1


# The share of rows that a tiny shift may move by a flip.
FLIPPED_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class WatchedLoss:
    """A loss, and beside it a digest of what the model computed for the row, bit for bit.

    Args:
        loss: the loss.
    """

    loss: PerExampleLoss

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the loss and the digest of each row, float32 `[batch, 2]`. The digest is below 1e-4."""
        seen: list[torch.Tensor] = []
        with ExitStack() as hooks:
            base, layer = unwrap_model(model), find_output_layer(model)
            hooks.enter_context(base.register_forward_hook(lambda *call: seen.extend(iterate_tensors(call[-1]))))
            if layer is not None:  # Where a loss computes its own logits, the model returns none.
                watch = layer.register_forward_pre_hook
                hooks.enter_context(watch(lambda _, args: seen.extend(iterate_tensors(args)), prepend=True))
            losses = self.loss(model, inputs)
        parts = [tensor for tensor in seen if tensor.ndim and len(tensor) == len(losses)]
        digests = [checksum([part[row].contiguous() for part in parts]) % 2**_BITS for row in range(len(losses))]
        scaled = torch.tensor(digests, dtype=torch.float32, device=losses.device) * _SCALE
        return torch.stack([losses.float(), scaled], dim=1)


def watch_outputs(losses: BatchLosses) -> BatchLosses:
    """Return `losses` with a digest of the model's outputs beside each of them, `[rows, 2]`."""
    return replace(losses, loss=WatchedLoss(loss=losses.loss), tail=(2,))


def changes_in_jumps(model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Sequence[Any]]) -> bool:
    """Return whether losses stay where they are while weights move a little, and jump where these move far.

    Args:
        model: the model.
        losses: the losses of a logical batch.
        batches: batches of public rows.
    """
    watched = watch_outputs(losses)
    trained = dict(enumerate(parameter for parameter in model.parameters() if parameter.requires_grad))
    directions = Gaussian(seed=0, sizes=[parameter.numel() for parameter in trained.values()])

    def evaluate(shift: float) -> torch.Tensor:
        with shifted(trained, directions, {0: START, 1: shift}):
            return torch.cat([watched.of_public(model, rows) for rows in batches])

    base, near = evaluate(0.0), evaluate(TINY_SHIFT)
    moved = base != near
    # Only rows whose outputs moved say anything about the loss.
    if not moved[:, 1].any() or moved[moved[:, 1], 0].float().mean() > FLIPPED_SHARE:
        return False
    shifted_losses = chain([near], map(evaluate, LARGE_SHIFTS))
    changes = (_find_least_change(base[:, 0], found[:, 0]) for found in shifted_losses)
    first = next((change for change in changes if change is not None), 0.0)
    return first >= LEAST_JUMP


def _find_least_change(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Return the smallest change of a row's loss that is not zero, as a share of it; `None` if no loss changed."""
    changes = ((after - before).abs() / before.abs().clamp(min=LEAST_LOSS))[after != before]
    return changes.min().item() if len(changes) else None
