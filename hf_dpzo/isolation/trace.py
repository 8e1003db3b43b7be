"""What the modules of a model make of one row of a batch, and where two runs of it part."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch


Row = dict[str, Any]


Parts = list[torch.Tensor | None]


# Relative to a tensor's largest entry: how far rounding may move what a module makes of a row.
ROUNDING = 1e-5


class ModuleTrace:
    """What modules were given and made of one row, found by its content, in the order in which they returned."""

    def __init__(self, model: torch.nn.Module, row: Row, hooks: ExitStack) -> None:
        self._row, self._location, self._inputs = row, None, []
        self.calls: list[tuple[str, Parts, Parts]] = []
        for name, module in model.named_modules():
            called = f"module {name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            hooks.enter_context(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(functools.partial(self._leave, called)))

    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = list(iterate_tensors([args, kwargs]))
        known = self._location if self._inputs else None  # An outermost call may be of other rows.
        self._location = known or next(filter(None, (locate_row(tensor, self._row) for tensor in tensors)), None)
        self._inputs.append(self._extract_parts(tensors))  # Before the module runs, for it may write into them.

    def _leave(self, called: str, module: torch.nn.Module, args: tuple, output: Any) -> None:
        inputs, made = self._inputs.pop(), list(iterate_tensors(output))
        if self._location and all(tensor.numel() for tensor in made):  # A loss may ask an output layer for nothing.
            self.calls.append((called, inputs, self._extract_parts(made)))

    def _extract_parts(self, tensors: list[torch.Tensor]) -> Parts:
        return [self._location.extract(tensor) if self._location else None for tensor in tensors]


@dataclass(frozen=True, kw_only=True)
class RowLocation:
    """Which row of a batch is meant, and where among `width` padded tokens its own are."""

    index: int
    batch: int
    start: int
    length: int
    width: int

    def extract(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The row's part of a tensor, without padding, or None where there is no telling."""
        shared = tensor.shape[:1] == (1,)  # Such as positions.
        if not (tensor.numel() and tensor.ndim) or (tensor.shape[0] % self.batch and not shared):
            return None
        part = tensor[0] if shared else tensor.unflatten(0, (self.batch, -1))[self.index].squeeze(0)
        axis = next((axis for axis, size in enumerate(part.shape) if size == self.width), None)
        return (part if axis is None else part.narrow(axis, self.start, self.length)).cpu().double().clone()


def locate_row(tensor: torch.Tensor, row: Row) -> RowLocation | None:
    """Where a batch holds a row's tokens, or its first feature; None where it does not."""
    features = [torch.as_tensor(row["input_ids"])] if "input_ids" in row else list(extract_features(row).values())
    if not features or tensor.ndim != features[0].ndim + 1:
        return None
    flat, content = tensor.flatten(1), features[0].flatten().to(tensor.device)
    if flat.shape[1] < len(content) or tensor.is_floating_point() != content.is_floating_point():
        return None
    found = (flat.unfold(1, len(content), 1) == content).all(dim=-1).nonzero().tolist()
    sizes = {"batch": len(flat), "length": len(content), "width": flat.shape[1]}
    return next((RowLocation(index=index, start=start, **sizes) for index, start in found), None)


def iterate_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in `value`, however deep in lists, tuples and mappings."""
    if isinstance(value, torch.Tensor) and not value.is_complex():  # Those have no order.
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from iterate_tensors(part)


def parts_differ(before: Parts, after: Parts) -> bool | None:
    """Whether a row's parts moved by more than rounding. None: none of them has kept its shape."""
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a is not None and b is not None]
    pairs = [(a, b, ROUNDING * a.nan_to_num(0, 0, 0).abs().max().item()) for a, b in pairs if a.shape == b.shape]
    return not all(torch.allclose(a, b, rtol=0, atol=far, equal_nan=True) for a, b, far in pairs) if pairs else None


def extract_features(row: Row) -> dict[str, torch.Tensor]:
    """The fields of floats, without the labels."""
    tensors = {}
    for name, value in row.items():
        with suppress(TypeError, ValueError, RuntimeError):  # A text is no tensor.
            tensors[name] = torch.as_tensor(value)
    return {k: v for k, v in tensors.items() if v.ndim and v.is_floating_point() and not k.startswith("label")}
