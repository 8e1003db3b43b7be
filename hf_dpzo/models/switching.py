"""Computes with another adapter than the trained one, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
