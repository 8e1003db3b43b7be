"""Chooses the form of a run's steps: a whole or a split model, one process or points shared by several."""

from collections.abc import Callable
from typing import Any

import torch

from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.estimate import StepEstimate
from hf_dpzo.step.fsdp import FSDPLosses, GatherOrder
from hf_dpzo.step.point_parallel import PointParallelEstimate


def assemble_estimate(
    model: torch.nn.Module,
    processes: Processes,
    *,
    loss: PerExampleLoss,
    collator: LogicalBatchCollator,
    prepare: Callable[[Any], Any],
    device: torch.device,
    capacity: int | None,
) -> StepEstimate:
    """Return what evaluates the batches of a run.

    Args:
        model: the model to be trained, whole or split over processes.
        processes: the run's processes.
        loss: as in `BatchLosses`, like `collator`, `prepare` and `device`.
        collator: cuts batches into micro-batches.
        prepare: moves inputs to the model.
        device: the device of the losses.
        capacity: the number of rows that a batch has room for where all processes have the same batch and share out its
            probe points; `None` where each has a share of the batch.
    """
    parts = {"loss": loss, "collator": collator, "prepare": prepare, "device": device}
    if is_sharded(model.parameters()):
        losses = FSDPLosses(**parts, processes=processes, gather_order=GatherOrder(model))
    else:
        losses = BatchLosses(**parts)
    if capacity is None:
        return StepEstimate(losses=losses)
    return PointParallelEstimate(losses=losses, processes=processes, capacity=capacity)
