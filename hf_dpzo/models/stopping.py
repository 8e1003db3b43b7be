"""A forward pass that ends at a layer, so that nothing behind it, or not even the layer, is computed."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class _ReachedError(Exception):
    """Ends a forward pass."""


@contextmanager
def stopped_behind(layer: torch.nn.Module) -> Iterator[list[Any]]:
    """End the context as soon as `layer` has returned.

    Yields a list that then holds what it returned, and nothing if the layer was not reached.

    >>> layers = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(1, 1))
    >>> with stopped_behind(layers[0]) as returned:
    ...     _ = layers(torch.ones(2, 2))  # The second layer would fail.
    >>> returned[0].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    returned: list[Any] = []

    def stop(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        returned.append(output)
        raise _ReachedError

    hook = layer.register_forward_hook(stop)
    try:
        with suppress(_ReachedError):
            yield returned
    finally:
        hook.remove()


@contextmanager
def stopped_before(layer: torch.nn.Module | None) -> Iterator[None]:
    """End the context as soon as `layer` is called, before it computes anything; with `None`, where it ends by itself.

    >>> layers = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(1, 1))
    >>> with stopped_before(layers[1]):
    ...     _ = layers(torch.ones(2, 2))  # The second layer would fail.
    """
    if layer is None:
        yield
        return

    def stop(module: torch.nn.Module, inputs: tuple) -> None:
        raise _ReachedError

    hook = layer.register_forward_pre_hook(stop)
    try:
        with suppress(_ReachedError):
            yield
    finally:
        hook.remove()
