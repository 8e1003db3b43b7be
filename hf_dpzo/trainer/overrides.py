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


# Hooks that have an effect in a subclass of `ZOTrainer`, but not in a class that it is combined with.
SHADOWED_HOOKS = {
    "get_train_dataloader": "its batches are replaced by Poisson samples; remove it, and pass train_dataset",
    "prediction_step": (
        "evaluation goes by the per-example loss and its scores, and would ignore it; override it in the subclass of "
        "ZOTrainer"
    ),
}


# Attributes of a trainer that stock reads in training, and that would be ignored here.
REPLACED_ATTRIBUTES = {
    "compute_loss_func": "it returns one number for a batch; pass per_example_loss, which returns one for each",
    "label_smoother": "it would be ignored; pass a per_example_loss that smooths each row",
}


# Where classes come from whose hooks are those that are meant.
_OWN = ("hf_dpzo", "transformers", "builtins")


def refuse_overrides(trainer: Trainer, *, joined: type | None, replaces_loss: bool) -> None:
    """Raise `ValueError` for a hook that a class of `trainer`, or the instance, overrides, and training would ignore.

    All classes are looked at in which Python would look, but those of this library and of transformers: subclasses of
    `ZOTrainer`, and classes that it is combined with.

    Args:
        trainer: the trainer, built or about to be built.
        joined: the class that it is combined with whose loss is known, and whose hooks therefore have an effect.
        replaces_loss: whether the user has passed a loss, which replaces that of any class it is combined with.
    """
    for owner, name, is_below in _find_overrides(trainer):
        is_known = owner is not None and owner is joined
        is_replaced = name == "compute_loss" and is_below and replaces_loss
        reason = REPLACED_HOOKS.get(name) or (SHADOWED_HOOKS[name] if is_below else None)
        if reason is not None and not is_known and not is_replaced:
            where = "trainer" if owner is None else owner.__qualname__
            raise ValueError(f"{name}={where}.{name}: {reason}.")
    for name, reason in REPLACED_ATTRIBUTES.items():
        value = vars(trainer).get(name)
        if value is not None:
            raise ValueError(f"{name}={type(value).__name__}: {reason}.")
    _refuse_own_optimizer(*map(vars(trainer).get, ("optimizer", "lr_scheduler", "optimizer_cls_and_kwargs")))


def _find_overrides(trainer: Trainer) -> Iterator[tuple[type | None, str, bool]]:
    """Yield who overrides a hook, the hook's name, and whether that is a class that ours is combined with.

    Who is a class, or `None` for the instance.
    """
    names = (*REPLACED_HOOKS, *SHADOWED_HOOKS)
    yield from ((None, name, False) for name in names if name in vars(trainer))
    is_below = False
    for kind in type(trainer).__mro__:
        package = kind.__module__.partition(".")[0]
        is_below = is_below or package == "hf_dpzo"
        if package not in _OWN:
            yield from ((kind, name, is_below) for name in names if name in vars(kind))
        else:  # What somebody has put into a class of ours or of transformers. A step of ours would be called.
            ignored = (name for name in REPLACED_HOOKS if name != "training_step" or package != "hf_dpzo")
            yield from ((kind, name, False) for name in ignored if _is_foreign(vars(kind).get(name)))


def _is_foreign(hook: Any) -> bool:
    """Return whether a hook comes from elsewhere; `False` for none, and for one that does not say where it is from."""
    package = (getattr(hook, "__module__", None) or _OWN[0]).partition(".")[0]
    return package not in _OWN


def _refuse_own_optimizer(optimizer: Any, schedule: Any, built_from: tuple | None) -> None:
    """Raise `ValueError` for an optimizer or a schedule that somebody gave to the trainer."""
    if built_from is not None and not issubclass(built_from[0], ZOOptimizer):
        raise ValueError(
            f"optimizer_cls_and_kwargs={built_from[0].__name__}: the update is made by ZOOptimizer; set learning_rate "
            "and update."
        )
    if optimizer is not None and not isinstance(unwrap_optimizer(optimizer), ZOOptimizer):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: the update is made by ZOOptimizer; set learning_rate and update."
        )
    if schedule is not None and optimizer is None:
        raise ValueError(
            f"lr_scheduler={type(schedule).__name__}: a schedule belongs to the optimizer of this run; set "
            "lr_scheduler_type, or override create_scheduler."
        )


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
