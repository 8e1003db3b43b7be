"""The losses of a model that is sharded over processes. Each forward pass gathers weights, which needs every process.

All processes are therefore at the same point at any time, and make the same number of passes. How many micro-batches a
process has is secret, and so is whether a user's code fails on one of them. So a process that has nothing to evaluate,
or fails at it, still takes part in what the others gather.
"""

import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.data.sealed import OutOfSyncError
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.distributed.sharding import find_fsdp_roots, is_sharded
from hf_dpzo.models.unwrap import Inputs
from hf_dpzo.step.batch_losses import BatchLosses


class GatherOrder:
    """The order in which passes through a model gather the weights of its modules, the same in all processes.

    It is learned from a pass that every process makes. A later pass fails before it gathers in another order. One that
    ends early gathers the rest.

    Args:
        model: the model, sharded by `fully_shard`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._roots = find_fsdp_roots(model)
        self._called: set[FSDPModule] = set()
        self._own_parameters = {
            module: _find_own_parameters(module) for module in model.modules() if isinstance(module, FSDPModule)
        }
        self._order: list[FSDPModule] | None = None
        # What the present pass has begun to gather; `None` outside a pass.
        self._gathered: list[FSDPModule] | None = None
        # The number of these that are gathered for certain. The last one may have failed.
        self._num_certain = 0
        for root in self._roots:
            # By default the weights of the outermost modules stay whole after a pass, and the next pass would not see
            # that their shards have moved.
            root.set_reshard_after_forward(True)
        for module in self._own_parameters:
            module.reshard()
            module.register_forward_pre_hook(self._before, prepend=True)
            module.register_forward_pre_hook(self._after)

    def forget(self) -> None:
        """Forget the order, so that the next pass sets it."""
        self._order = None

    @contextmanager
    def complete_pass(self) -> Iterator[None]:
        """Ensure that everything that a whole pass gathers is gathered inside the context, whatever happens there.

        Raises:
            OutOfSyncError: gathering fails, so this process must end for the others to notice.
        """
        self._gathered = []
        self._num_certain = 0
        try:
            yield
        except KeyboardInterrupt:  # The other processes are interrupted too.
            raise
        except BaseException as error:
            # The frames hold activations, and gathering needs their memory.
            traceback.clear_frames(error.__traceback__)
            self._end_pass()
            raise
        if self._order is None:
            self._order = self._gathered
        self._end_pass()

    def _before(self, module: FSDPModule, args: Any) -> None:
        self._called.add(module)
        if self._gathered is None or not self._is_sharded(module):
            return
        place = len(self._gathered)
        if self._order is not None and (place == len(self._order) or self._order[place] is not module):
            raise RuntimeError(
                "model: weights are gathered in another order than before; what a pass runs must not depend on rows."
            )
        self._gathered.append(module)

    def _after(self, module: FSDPModule, args: Any) -> None:
        self._num_certain = len(self._gathered or ())

    def _is_sharded(self, module: FSDPModule) -> bool:
        return any(is_sharded([getattr(inner, name)]) for inner, name in self._own_parameters[module])

    def _end_pass(self) -> None:
        gathered, self._gathered = self._gathered, None
        # The last module is still sharded if the pass failed before its weights were gathered.
        if len(gathered) > self._num_certain and self._is_sharded(gathered[-1]):
            gathered = gathered[:-1]
        try:
            for root in self._called.intersection(self._roots):
                # Needed after every pass: without a backward pass FSDP never forgets the order of forward passes.
                root.reset_iter_state()
            for module in (self._order or [])[len(gathered) :]:
                module.unshard()
                module.reshard()
        except Exception as error:
            raise OutOfSyncError(
                f"model: this process can not gather the weights that the others gather ({type(error).__name__}); "
                "leave more memory free, by a lower per_device_train_batch_size, and resume from the log."
            ) from None


def _find_own_parameters(module: FSDPModule) -> list[tuple[torch.nn.Module, str]]:
    """Return the owner and the name of each parameter that FSDP gathers when `module` itself is called."""
    own = []
    waiting = [module]
    while waiting:
        inner = waiting.pop()
        own += [(inner, name) for name, _ in inner.named_parameters(recurse=False)]
        waiting += [child for child in inner.children() if not isinstance(child, FSDPModule)]
    return own


@dataclass(frozen=True, kw_only=True)
class FSDPLosses(BatchLosses):
    """Evaluates this process' share of a batch, in as many passes as the other processes make. SENSITIVE.

    Args:
        processes: the run's processes.
        gather_order: the order in which a pass gathers the model's weights.
    """

    processes: Processes
    gather_order: GatherOrder

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """Return one loss for each row, float32 `[rows]`; NaN for a row whose loss could not be computed."""
        waiting = deque(batch.micro_batches)
        losses = [torch.empty((0, *self.tail), device=self.device)]
        while self.processes.all_reduce_max(float(len(waiting) > 0)):
            if waiting:
                losses += self._evaluate_next(model, waiting)
            else:
                with self.gather_order.complete_pass():
                    pass
        return torch.cat(losses)

    def learn_gather_order(self, model: torch.nn.Module, rows: Sequence[Any]) -> None:
        """Learn the order of gathering from passes over public `rows`, which all processes must make."""
        # Twice, because at its first call a loss may make passes of its own to try what the architecture allows.
        for _ in range(2):
            self.gather_order.forget()
            self.of_public(model, rows)

    def _call_loss(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        with self.gather_order.complete_pass():
            return super()._call_loss(model, inputs)
