"""Finds out whether a model's frozen layers can be passed over, by trying it on public rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo import OptimizedModule

from hf_dpzo.frozen.layers import find_stretches
from hf_dpzo.frozen.shared import SharedWork
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.fsdp import FSDPLosses
from hf_dpzo.zo.directions import Gaussian
from hf_dpzo.zo.shift import shifted


# The distances, in units of public noise, of the two points between which work is shared.
POINTS = (0.05, -0.05)


@torch.no_grad()
def find_shared_work(
    model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Sequence[Mapping[str, Any]]]
) -> SharedWork | None:
    """Return what keeps the work that all probe points share; `None` for a model that must be evaluated as a whole.

    The losses of public rows at one point, computed from what was kept at another one, must be those of whole passes,
    bit for bit. A model that is compiled, or sharded over processes, is evaluated as a whole.

    Args:
        model: the model as it is trained.
        losses: the losses of a logical batch, as in training.
        batches: batches of public rows.
    """
    if isinstance(model, OptimizedModule) or isinstance(losses, FSDPLosses) or not batches:
        return None
    try:
        stretches = find_stretches(model, lambda: losses.of_public(model, batches[0]))
        shared = SharedWork(model, stretches)
        agrees = bool(stretches) and all(_agrees(model, losses, shared, rows) for rows in batches)
    except Exception:  # Rows or models that fail are refused elsewhere, with the reason.
        return None
    return shared if agrees else None


def _agrees(model: torch.nn.Module, losses: BatchLosses, shared: SharedWork, rows: Sequence[Mapping[str, Any]]) -> bool:
    trained = dict(enumerate(parameter for parameter in model.parameters() if parameter.requires_grad))
    directions = Gaussian(seed=0, sizes=[parameter.numel() for parameter in trained.values()])
    sharing = replace(losses, shared=shared)
    batch = losses.build_public_batch(rows)
    with shared.opened(batch.micro_batches):
        for distance in POINTS:
            with shifted(trained, directions, {0: distance}):
                if not torch.equal(sharing(model, batch), losses(model, batch)):
                    return False
    return True
