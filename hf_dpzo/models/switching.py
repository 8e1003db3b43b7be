"""Computes with another adapter than the trained one, for a while."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel


@contextmanager
def switched_adapter(model: torch.nn.Module, adapter: str | None) -> Iterator[None]:
    """Compute with another adapter inside the context, or with none. Afterwards the same parameters are trained.

    Args:
        model: a model of PEFT.
        adapter: the name of the other adapter; `None` for the base model alone.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapter
    try:
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter)
            yield
    finally:
        if adapter is not None:
            model.set_adapter(active)
        for parameter, is_trained in trained:  # PEFT would train all parts of an adapter that it switches on.
            if parameter.requires_grad != is_trained:
                parameter.requires_grad_(is_trained)


def without_adapter(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Return a context in which `model` computes without the adapter that is trained, if it has one."""
    return switched_adapter(model, None) if isinstance(model, PeftModel) else nullcontext()
