"""A model that is split over processes: each forward pass gathers its weights, for which every process is needed.

So all are at the same point at any time, and make the same number of passes. How many micro-batches a process has is
secret, and so is whether somebody's code fails on one of them: one that has nothing to evaluate, or could not, joins in
what the others gather.
"""

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments

from hf_dpzo.collation import LogicalBatch, LogicalBatchCollator, MicroBatch
from hf_dpzo.losses import BatchLosses, PerExampleLoss
from hf_dpzo.output_layer import unwrapped
from hf_dpzo.processes import Processes
from hf_dpzo.sealed import OutOfStepError
from hf_dpzo.sharded import is_split, local_part, roots


# How accelerate calls one process, and several of which each has a model of its own making.
LAUNCHED = ("NO", "MULTI_CPU", "MULTI_GPU")


class Gathers:
    """The order in which passes through `model` gather the weights of its modules; the same in all processes.

    It is learned from a pass that every process makes. A pass that would gather something else fails before it does,
    and one that ends early gathers the rest.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._roots, self._run = roots(model), set()
        self._own = {module: _own_parameters(module) for module in model.modules() if isinstance(module, FSDPModule)}
        self._order: list[FSDPModule] | None = None
        # Of the present pass: what it has gathered, where the last one may have failed; and how much surely.
        self._made: list[FSDPModule] | None = None
        self._sure = 0
        for root in self._roots:
            # Else the weights of the outermost modules stay whole after a pass, and do not show that parts have moved.
            root.set_reshard_after_forward(True)
        for module in self._own:
            module.reshard()
            module.register_forward_pre_hook(self._before, prepend=True)
            module.register_forward_pre_hook(self._after)

    def forget(self) -> None:
        """Learn the order from the next pass."""
        self._order = None

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Within, what is gathered is what a whole pass does, whatever happens.

        Raises:
            OutOfStepError: it can not be, and the other processes have to be told by the end of this one.
        """
        self._made, self._sure = [], 0
        try:
            yield
        except KeyboardInterrupt:  # The others have it too.
            raise
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # They hold what was computed, and memory is needed.
            self._end()
            raise
        if self._order is None:
            self._order = self._made
        self._end()

    def _before(self, module: FSDPModule, args: Any) -> None:
        self._run.add(module)
        if self._made is None or not self._is_split(module):
            return
        place = len(self._made)
        if self._order is not None and (place == len(self._order) or self._order[place] is not module):
            raise RuntimeError(
                "model: weights are gathered in another order than before; what a pass runs must not depend on rows."
            )
        self._made.append(module)

    def _after(self, module: FSDPModule, args: Any) -> None:
        self._sure = len(self._made or ())

    def _is_split(self, module: FSDPModule) -> bool:
        return any(is_split([getattr(inner, name)]) for inner, name in self._own[module])

    def _end(self) -> None:
        made, self._made = self._made, None
        if len(made) > self._sure and self._is_split(made[-1]):  # It failed before it was gathered.
            made = made[:-1]
        try:
            for root in self._run.intersection(self._roots):
                # Also where nothing failed: without a backward pass FSDP never forgets the order of forward passes.
                root.reset_iter_state()
            for module in (self._order or [])[len(made) :]:
                module.unshard()
                module.reshard()
        except Exception as error:
            raise OutOfStepError(
                f"model: this process can not gather the weights that the others gather ({type(error).__name__}); "
                "leave more memory free, by a lower per_device_train_batch_size, and resume from the log."
            ) from None


def _own_parameters(module: FSDPModule) -> list[tuple[torch.nn.Module, str]]:
    """Where the parameters are that FSDP gathers when `module` is called, and not one inside of it."""
    own, inside = [], [module]
    while inside:
        one = inside.pop()
        own += [(one, name) for name, _ in one.named_parameters(recurse=False)]
        inside += [child for child in one.children() if not isinstance(child, FSDPModule)]
    return own


@dataclass(frozen=True, kw_only=True)
class LockstepLosses(BatchLosses):
    """Evaluates this process' share of a batch, in as many passes as the other ones. SENSITIVE.

    Args:
        processes: of the run.
        gathers: of the model.
    """

    processes: Processes
    gathers: Gathers

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """One loss for each row, float32 `[rows]`; NaN for those whose loss could not be computed."""
        waiting, losses = deque(batch.micro_batches), [torch.empty((0, *self.tail), device=self.device)]
        while self.processes.largest(float(len(waiting) > 0)):
            if waiting:
                losses += self._of_next(model, waiting)
            else:
                with self.gathers.one_pass():
                    pass
        return torch.cat(losses)

    def learn(self, model: torch.nn.Module, rows: Sequence[Any]) -> None:
        """Make passes over public `rows` in all processes, from which the order of what is gathered is known."""
        for _ in range(2):  # The first time the loss may find out, by passes of its own, what the architecture allows.
            self.gathers.forget()
            self.of_public(model, rows)

    def _checked(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        with self.gathers.one_pass():
            return super()._checked(model, micro_batch)


def batch_losses(
    model: torch.nn.Module,
    processes: Processes,
    *,
    loss: PerExampleLoss,
    collator: LogicalBatchCollator,
    prepare: Callable[[Any], Any],
    device: torch.device,
) -> BatchLosses:
    """Return what evaluates logical batches by `model`, be it whole or split; the rest as for `BatchLosses`."""
    if not is_split(model.parameters()):
        return BatchLosses(loss=loss, collator=collator, prepare=prepare, device=device)
    gathers = Gathers(model)
    return LockstepLosses(
        loss=loss, collator=collator, prepare=prepare, device=device, processes=processes, gathers=gathers
    )


def refuse_sharded(model: torch.nn.Module, args: TrainingArguments, *, distributed_type: str) -> None:
    """Raise `ValueError` for a model that is split in a way that can not be trained.

    Args:
        model: to be trained.
        args: of the run.
        distributed_type: how accelerate calls the way in which processes work together.
    """
    if distributed_type not in LAUNCHED:
        raise ValueError(
            f"distributed_type={distributed_type}: it would change the model behind the optimizer's back; launch with "
            "--multi_gpu, or by torchrun, and split a model that is too large by fully_shard."
        )
    base = unwrapped(model)
    loaded = getattr(base.config, "distributed_config", None) if isinstance(base, PreTrainedModel) else None
    for kind in () if loaded is None else ("tp_size", "pp_size", "ep_size"):
        if (getattr(loaded, kind) or 1) > 1:
            raise ValueError(
                f"{kind}={getattr(loaded, kind)}: its processes have no rows of their own; set fsdp_size instead."
            )
    split = {name: one for name, one in [*model.named_parameters(), *model.named_buffers()] if is_split([one])}
    if not split:
        return
    name = next(iter(split))
    for module in model.modules():
        # torch 2.13 shows the policy nowhere else. Remove when it does.
        kind = module._get_fsdp_state()._mp_policy.param_dtype if isinstance(module, FSDPModule) else None
        if kind is not None and kind.itemsize < 4:
            raise ValueError(
                f"mp_policy: weights would be gathered in {kind}, which rounds what is trained too; load a frozen base "
                "in that type, and train a float32 adapter."
            )
    if not roots(model):
        raise ValueError(f"model: {name} is split, and not by fully_shard, which alone is supported; load it so.")
    for one in split.values():
        local_part(one)
    unfit = {
        "parallel": (args.parallel != "examples", "all processes have to be at the same point; set examples"),
        "points_per_pass": (args.points_per_pass is not None, "it needs whole parameters; remove it"),
        "load_best_model_at_end": (args.load_best_model_at_end, "a checkpoint is not taken apart again; set False"),
    }
    for setting, (made, remedy) in unfit.items():
        if made:
            raise ValueError(f"{setting}={getattr(args, setting)}: {name} is split over processes, and {remedy}.")


def refuse_split(model: torch.nn.Module, args: TrainingArguments, *, remembers: bool) -> None:
    """Raise `ValueError` where what is trained is split, and is to be moved or published in a way that needs all of it.

    Args:
        model: to be trained.
        args: of the run.
        remembers: whether a step depends on more than the parameters.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    split = [name for name, one in trained.items() if is_split([one])]
    remedy = "or add an adapter after the model is split: that is whole in each process"
    if split and len(split) < len(trained):
        alone = min(set(trained) - set(split))
        raise ValueError(
            f"model: {split[0]} is trained in parts and {alone} is not, which stock puts apart, so that directions are "
            f"numbered in another order; split all that is trained by fully_shard(model), {remedy}."
        )
    if split and remembers:
        raise ValueError(
            f"model: {split[0]} is trained and split over processes, and moments, constraints and masks need all of "
            f"it; use the update sgd of a method without constraint or mask, {remedy}."
        )
    if split and args.push_to_hub:
        raise ValueError(
            f"push_to_hub=True: {split[0]} is trained and split over processes, and one of them would push alone; "
            f"call save_model in all and upload the folder, {remedy}."
        )
