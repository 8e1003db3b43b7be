"""Finds what a user's class, or an instance, puts in the place of a hook, and passes on only what the next class takes.

A hook that training never calls would be ignored without a word.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Trainer

from hf_dpzo.models.unwrap import unwrap_optimizer
from hf_dpzo.zo.optimizer import ZOOptimizer


# Hooks that training ignores, or that would break it, each with the reason and the remedy.
REPLACED_HOOKS = {
    "compute_loss": (
        "training evaluates one loss for each row, by per_example_loss, and never calls it; pass per_example_loss, a "
        "function (model, inputs) that returns one loss for each row, and remove it"
    ),
    "training_step": "it is the private step, on which the guarantee depends; remove it, or use a callback",
    "_get_train_sampler": (
        "batches are Poisson samples, in which all units have one chance, so it would be ignored; remove it"
    ),
    "create_optimizer": "the update is made by ZOOptimizer; remove it, and set update and learning_rate",
    "create_optimizer_and_scheduler": "the update is made by ZOOptimizer; remove it, or override create_scheduler",
    "get_optimizer_cls_and_kwargs": "the update is made by ZOOptimizer; remove it, and set update and learning_rate",
    "compute_loss_context_manager": "training evaluates losses outside of it; remove it, and use per_example_loss",
    "autocast_smart_context_manager": (
        "training evaluates losses outside of it; remove it, and load a frozen base with dtype=torch.bfloat16"
    ),
    "_clip_grad_norm": "there is no gradient to clip; remove it, and set clip_norm",
}


# Attributes of a trainer that stock reads in training, and that would be ignored here.
REPLACED_ATTRIBUTES = {
    "compute_loss_func": "it returns one number for a batch; pass per_example_loss, which returns one for each",
    "label_smoother": "it would be ignored; pass a per_example_loss that smooths each row",
}


# Where classes come from whose hooks are those that are meant.
_OWN = ("hf_dpzo", "transformers", "builtins")


def refuse_overrides(trainer: Trainer, *, honoured: Mapping[str, type | None]) -> None:
    """Raise `ValueError` for a hook that a class of `trainer`, or the instance, overrides, and training would ignore.

    All classes are looked at in which Python would look, but those of this library and of transformers: subclasses of
    `ZOTrainer`, and classes that it is combined with.

    Args:
        trainer: the trainer, built or about to be built.
        honoured: hooks that do have an effect where a given class, or if it is `None` any class below ours, has them.
    """
    for name, reason in REPLACED_HOOKS.items():
        for owner in _find_overrides(trainer, name, honoured):
            raise ValueError(f"{name}={owner}.{name}: {reason}.")
    for name, reason in REPLACED_ATTRIBUTES.items():
        value = vars(trainer).get(name)
        if value is not None:
            raise ValueError(f"{name}={type(value).__name__}: {reason}.")
    optimizer, schedule = (vars(trainer).get(name) for name in ("optimizer", "lr_scheduler"))
    if optimizer is not None and not isinstance(unwrap_optimizer(optimizer), ZOOptimizer):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: the update is made by ZOOptimizer; set learning_rate and update."
        )
    if schedule is not None and optimizer is None:
        raise ValueError(
            f"lr_scheduler={type(schedule).__name__}: a schedule belongs to the optimizer of this run; set "
            "lr_scheduler_type, or override create_scheduler."
        )


def _find_overrides(trainer: Trainer, name: str, honoured: Mapping[str, type | None]) -> Iterator[str]:
    """Yield what overrides a hook, in words."""
    if name in vars(trainer):
        yield "trainer"
    is_below = False
    for kind in type(trainer).__mro__:
        is_own = kind.__module__.partition(".")[0] in _OWN
        is_below = is_below or (is_own and kind.__module__.startswith("hf_dpzo.trainer."))
        if is_own or name not in vars(kind):
            continue
        if name in honoured and (honoured[name] is kind or (honoured[name] is None and is_below)):
            continue
        yield kind.__qualname__


def select_arguments(trainer: Trainer, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the `given` arguments that the next class takes, such as a trainer that ours is combined with.

    Args:
        trainer: the trainer that is about to be built.
        given: arguments of stock's Trainer by name; `None` for those that the user has not passed.

    Raises:
        ValueError: the user has passed an argument that the next class does not take.
    """
    taken, next_class = _list_parameters(type(trainer))
    for name, value in given.items():
        if value is not None and name not in taken:
            raise ValueError(f"{name}: {next_class} takes no such argument; remove it.")
    return {name: value for name, value in given.items() if name in taken}


def _list_parameters(kind: type) -> tuple[set[str], str]:
    """Return the names that the constructors after ours take, and the name of the class of the first one."""
    taken, first = set(), None
    is_ours = [owner.__module__.startswith("hf_dpzo.") for owner in kind.__mro__]
    last = len(is_ours) - 1 - is_ours[::-1].index(True)
    for owner in kind.__mro__[last + 1 :]:
        if "__init__" not in vars(owner):
            continue
        first = first or owner.__name__
        parameters = inspect.signature(owner.__init__).parameters.values()
        taken |= {parameter.name for parameter in parameters}
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return taken, first
