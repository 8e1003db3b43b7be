"""Finds out what the probe points of a step can share, by trying it on public rows."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo import OptimizedModule

from hf_dpzo.frozen.layers import find_stretches
from hf_dpzo.frozen.shared import SharedWork
from hf_dpzo.models.precision import describe_reduced_precision
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.fsdp import FSDPLosses
from hf_dpzo.zo.directions import Gaussian
from hf_dpzo.zo.shift import shifted


# The distances, in units of public noise, of the two points between which work is shared.
POINTS = (0.05, -0.05)


# How far the losses of rows that are evaluated from an invocation on may be from those of whole rows: relative to the
# loss, or absolute for a loss below one. The same for a base that is not float32.
ROUNDING = 1e-4
REDUCED_ROUNDING = 0.05


@torch.no_grad()
def find_shared_work(
    model: torch.nn.Module, losses: BatchLosses, batches: Sequence[Sequence[Mapping[str, Any]]]
) -> SharedWork | None:
    """Return what keeps the work that all probe points share; `None` for a model that must be evaluated as a whole.

    It is tried on public rows. Their losses at one point, computed from what was kept at another one, must be those
    without anything kept, bit for bit. Those of rows that are evaluated from an invocation on must be those of whole
    rows, up to rounding. A model that is compiled, or sharded over processes, is evaluated as a whole.

    Args:
        model: the model as it is trained.
        losses: the losses of a logical batch, as in training.
        batches: batches of public rows.
    """
    if isinstance(model, OptimizedModule) or isinstance(losses, FSDPLosses) or not batches:
        return None
    for shared in _propose(model, losses, batches[0]):
        try:
            if all(_agrees(model, losses, shared, rows) for rows in batches):
                return shared
        except Exception:  # Rows or models that fail as a whole are refused elsewhere, with the reason.
            continue
    return None


def _propose(model: torch.nn.Module, losses: BatchLosses, rows: Sequence[Mapping[str, Any]]) -> Iterator[SharedWork]:
    """Yield what to try, the best first."""
    try:
        stretches = find_stretches(model, lambda: losses.of_public(model, rows))
    except Exception:
        return
    if losses.invocation is not None and losses.collator.suffix_rule is not None:
        fixed_shapes = losses.collator.has_fixed_shapes
        yield SharedWork(model, stretches, invocation=losses.invocation, fixed_shapes=fixed_shapes)
    if stretches:
        yield SharedWork(model, stretches)


def _agrees(model: torch.nn.Module, losses: BatchLosses, shared: SharedWork, rows: Sequence[Mapping[str, Any]]) -> bool:
    trained = dict(enumerate(parameter for parameter in model.parameters() if parameter.requires_grad))
    directions = Gaussian(seed=0, sizes=[parameter.numel() for parameter in trained.values()])
    batch = losses.build_public_batch(rows)

    def evaluate(form: BatchLosses) -> Iterator[torch.Tensor]:
        for distance in POINTS:
            with shifted(trained, directions, {0: distance}):
                yield form(model, batch)

    sharing = replace(losses, shared=shared)
    tolerance = ROUNDING if describe_reduced_precision(model) is None else REDUCED_ROUNDING
    alone = list(evaluate(sharing))
    are_close = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance, equal_nan=True)
    with shared.opened(batch.micro_batches):
        are_kept = all(map(_are_equal, alone, evaluate(sharing)))
    return are_kept and all(map(are_close, alone, evaluate(losses)))


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
