"""A model that is split over processes: each forward pass gathers its weights, for which every process is needed.

So all are at the same point at any time, and make the same number of passes. How many micro-batches a process has is
secret, and so is whether somebody's code fails on one of them: one that has nothing to evaluate, or could not, joins in
what the others gather.
"""

import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from hf_dpzo.data.collation import LogicalBatch, MicroBatch
from hf_dpzo.data.sealed import OutOfSyncError
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.distributed.sharding import find_fsdp_roots, is_sharded
from hf_dpzo.step.batch_losses import BatchLosses


class GatherOrder:
    """The order in which passes through `model` gather the weights of its modules; the same in all processes.

    It is learned from a pass that every process makes. A pass that would gather something else fails before it does,
    and one that ends early gathers the rest.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._roots, self._run = find_fsdp_roots(model), set()
        self._own_parameters = {
            module: _find_own_parameters(module) for module in model.modules() if isinstance(module, FSDPModule)
        }
        self._order: list[FSDPModule] | None = None
        # Of the present pass: what it has gathered, where the last one may have failed; and how much surely.
        self._gathered: list[FSDPModule] | None = None
        self._sure = 0
        for root in self._roots:
            # Else the weights of the outermost modules stay whole after a pass, and do not show that parts have moved.
            root.set_reshard_after_forward(True)
        for module in self._own_parameters:
            module.reshard()
            module.register_forward_pre_hook(self._before, prepend=True)
            module.register_forward_pre_hook(self._after)

    def forget(self) -> None:
        """Learn the order from the next pass."""
        self._order = None

    @contextmanager
    def complete_pass(self) -> Iterator[None]:
        """Within, what is gathered is what a whole pass does, whatever happens.

        Raises:
            OutOfSyncError: it can not be, and the other processes have to be told by the end of this one.
        """
        self._gathered, self._sure = [], 0
        try:
            yield
        except KeyboardInterrupt:  # The others have it too.
            raise
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # They hold what was computed, and memory is needed.
            self._end_pass()
            raise
        if self._order is None:
            self._order = self._gathered
        self._end_pass()

    def _before(self, module: FSDPModule, args: Any) -> None:
        self._run.add(module)
        if self._gathered is None or not self._is_sharded(module):
            return
        place = len(self._gathered)
        if self._order is not None and (place == len(self._order) or self._order[place] is not module):
            raise RuntimeError(
                "model: weights are gathered in another order than before; what a pass runs must not depend on rows."
            )
        self._gathered.append(module)

    def _after(self, module: FSDPModule, args: Any) -> None:
        self._sure = len(self._gathered or ())

    def _is_sharded(self, module: FSDPModule) -> bool:
        return any(is_sharded([getattr(inner, name)]) for inner, name in self._own_parameters[module])

    def _end_pass(self) -> None:
        made, self._gathered = self._gathered, None
        if len(made) > self._sure and self._is_sharded(made[-1]):  # It failed before it was gathered.
            made = made[:-1]
        try:
            for root in self._run.intersection(self._roots):
                # Also where nothing failed: without a backward pass FSDP never forgets the order of forward passes.
                root.reset_iter_state()
            for module in (self._order or [])[len(made) :]:
                module.unshard()
                module.reshard()
        except Exception as error:
            raise OutOfSyncError(
                f"model: this process can not gather the weights that the others gather ({type(error).__name__}); "
                "leave more memory free, by a lower per_device_train_batch_size, and resume from the log."
            ) from None


def _find_own_parameters(module: FSDPModule) -> list[tuple[torch.nn.Module, str]]:
    """Where the parameters are that FSDP gathers when `module` is called, and not one inside of it."""
    own, inside = [], [module]
    while inside:
        one = inside.pop()
        own += [(one, name) for name, _ in one.named_parameters(recurse=False)]
        inside += [child for child in one.children() if not isinstance(child, FSDPModule)]
    return own


@dataclass(frozen=True, kw_only=True)
class FSDPLosses(BatchLosses):
    """Evaluates this process' share of a batch, in as many passes as the other ones. SENSITIVE.

    Args:
        processes: of the run.
        gather_order: of the model.
    """

    processes: Processes
    gather_order: GatherOrder

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """One loss for each row, float32 `[rows]`; NaN for those whose loss could not be computed."""
        waiting, losses = deque(batch.micro_batches), [torch.empty((0, *self.tail), device=self.device)]
        while self.processes.all_reduce_max(float(len(waiting) > 0)):
            if waiting:
                losses += self._of_next(model, waiting)
            else:
                with self.gather_order.complete_pass():
                    pass
        return torch.cat(losses)

    def learn_gather_order(self, model: torch.nn.Module, rows: Sequence[Any]) -> None:
        """Make passes over public `rows` in all processes, from which the order of what is gathered is known."""
        for _ in range(2):  # The first time the loss may find out, by passes of its own, what the architecture allows.
            self.gather_order.forget()
            self.of_public(model, rows)

    def _checked(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        with self.gather_order.complete_pass():
            return super()._checked(model, micro_batch)
