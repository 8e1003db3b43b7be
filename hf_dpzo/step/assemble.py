"""Chooses the form of a run's steps: a whole or a sharded model, one process or probe points spread over several."""

from collections.abc import Callable
from typing import Any

import torch

from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.activation import find_invocation
from hf_dpzo.models.state import ModelState
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
    state: ModelState,
    capacity: int | None,
) -> StepEstimate:
    """Return the estimate that evaluates the batches of a run.

    Args:
        model: the model to be trained, whole or sharded over processes.
        processes: the run's processes.
        loss: the loss of a micro-batch.
        collator: the collator that cuts batches into micro-batches.
        prepare: a function that moves inputs to the model's device.
        device: the device of the losses.
        state: the state of the model at the beginning of the run.
        capacity: the number of rows that a batch has room for, if all processes have the same batch and divide its
            probe points; `None` if each process has a share of the batch.
    """
    parts = {"loss": loss, "collator": collator, "prepare": prepare, "device": device, "state": state}
    parts["invocation"] = find_invocation(model)
    if is_sharded(model.parameters()):
        losses = FSDPLosses(**parts, processes=processes, gather_order=GatherOrder(model))
    else:
        losses = BatchLosses(**parts)
    if capacity is None:
        return StepEstimate(losses=losses)
    return PointParallelEstimate(losses=losses, processes=processes, capacity=capacity)
