"""Finds the layers of a model that no trained parameter comes before.

What such layers return is the same at all probe points. Which they are is read off one evaluation, not off a list of
architectures: the layers are the items of lists of modules, and a layer is frozen if it has returned before the first
module with trained parameters is entered.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Layers that are called one after the other, each with what the one before has returned.

    Args:
        layers: the layers, in the order of their calls.
    """

    layers: tuple[torch.nn.Module, ...]


def find_stretches(model: torch.nn.Module, evaluate: Callable[[], Any]) -> tuple[Stretch, ...]:
    """Return the layers that no trained parameter comes before, in the order of their calls.

    Args:
        model: the model.
        evaluate: evaluates the model on public rows.

    >>> model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(4)])
    >>> _ = model[:2].requires_grad_(False)
    >>> [stretch.layers == (model[0], model[1]) for stretch in find_stretches(model, lambda: model(torch.ones(1, 2)))]
    [True]
    """
    with ExitStack() as hooks:
        order = _CallOrder(model, hooks)
        evaluate()
    first_trained = min((order.find_entry(name) for name in _list_trained(model)), default=0)
    stretches: list[list[torch.nn.Module]] = []
    for layer, left in order.left.items():
        if left > first_trained:
            continue
        if stretches and (stretches[-1][-1], layer) in order.links:
            stretches[-1].append(layer)
        else:
            stretches.append([layer])
    return tuple(Stretch(layers=tuple(layers)) for layers in stretches)


def list_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in `value`, however deep in lists, tuples and mappings, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in list_tensors(part)] if isinstance(value, list | tuple) else []


class _CallOrder:
    """The order in which the modules of a model are first entered, and its layers first left.

    Args:
        model: the model.
        hooks: the exit stack that removes the hooks.
    """

    def __init__(self, model: torch.nn.Module, hooks: ExitStack) -> None:
        self._time = 0
        self._entered: dict[str, int] = {}
        self._returned: tuple[torch.nn.Module, list[torch.Tensor]] | None = None
        # When each layer was left for the first time, in that order.
        self.left: dict[torch.nn.Module, int] = {}
        # The pairs of layers of which the second received what the first had just returned.
        self.links: set[tuple[torch.nn.Module, torch.nn.Module]] = set()
        for name, module in model.named_modules(remove_duplicate=False):
            hooks.enter_context(module.register_forward_pre_hook(self._build_entry(name)))
        for layer in _iterate_layers(model):
            hooks.enter_context(layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(self._leave_layer))

    def find_entry(self, parameter: str) -> int:
        """Return when the innermost module that holds a parameter, and that was called, was entered."""
        holders = parameter.split(".")
        names = (".".join(holders[:depth]) for depth in range(len(holders) - 1, -1, -1))
        return next((self._entered[name] for name in names if name in self._entered), 0)

    def _build_entry(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._entered.setdefault(name, self._tick())

        return enter

    def _enter_layer(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        received = list_tensors([args, kwargs])
        if self._returned and received and self._returned[1] and torch.equal(received[0], self._returned[1][0]):
            self.links.add((self._returned[0], layer))

    def _leave_layer(self, layer: torch.nn.Module, args: tuple, output: Any) -> None:
        self._returned = (layer, list_tensors(output))
        self.left.setdefault(layer, self._tick())

    def _tick(self) -> int:
        self._time += 1
        return self._time


def _list_trained(model: torch.nn.Module) -> list[str]:
    """Return the names of the trained parameters, of tied ones all of their names."""
    return [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.requires_grad]


def _iterate_layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the items of the outermost lists of modules."""
    for child in module.children():
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential):
            yield child
        else:
            yield from _iterate_layers(child)
