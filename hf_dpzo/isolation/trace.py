"""Traces one row of a batch through the modules of a model, so that two traces can be compared."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch

from hf_dpzo.data.pairs import split_pair


Row = dict[str, Any]


# What each tensor of a call holds of the row; `None` for a tensor in which the row cannot be found.
Parts = list[torch.Tensor | None]


# How far rounding may move a row's part of a tensor, relative to the largest entry.
ROUNDING = 1e-5


class ModuleTrace:
    """Records what each module receives and returns of one row, in the order in which modules return.

    `calls` holds for each module its name in words, and the row's parts of its inputs and of its outputs. The row is
    found by its content.

    Args:
        model: the model whose modules are traced.
        row: the row to follow.
        hooks: the exit stack that removes the hooks.
    """

    def __init__(self, model: torch.nn.Module, row: Row, hooks: ExitStack) -> None:
        self._row = row
        self._location: RowLocation | None = None
        self._inputs: list[Parts] = []
        self.calls: list[tuple[str, Parts, Parts]] = []
        for name, module in model.named_modules():
            description = f"module {name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            hooks.enter_context(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(functools.partial(self._leave, description)))

    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = list(iterate_tensors([args, kwargs]))
        # An outermost call may be a micro-batch of other rows.
        known = self._location if self._inputs else None
        self._location = known or next(filter(None, (locate_row(tensor, self._row) for tensor in tensors)), None)
        # Extracted before the module runs, because it may write into its inputs.
        self._inputs.append(self._extract_parts(tensors))

    def _leave(self, description: str, module: torch.nn.Module, args: tuple, output: Any) -> None:
        inputs = self._inputs.pop()
        outputs = list(iterate_tensors(output))
        # A loss may call an output layer with no positions, and compute its logits elsewhere.
        if self._location and all(tensor.numel() for tensor in outputs):
            self.calls.append((description, inputs, self._extract_parts(outputs)))

    def _extract_parts(self, tensors: list[torch.Tensor]) -> Parts:
        return [self._location.extract(tensor) if self._location else None for tensor in tensors]


@dataclass(frozen=True, kw_only=True)
class RowLocation:
    """The place of a row in a padded batch.

    Args:
        index: the row's index in the batch.
        batch: the number of rows in the batch.
        start: the index of the row's first token.
        length: the number of the row's tokens, without padding.
        width: the number of tokens in each row of the batch, with padding.
    """

    index: int
    batch: int
    start: int
    length: int
    width: int

    def extract(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the row's part of a tensor, without padding; `None` if the tensor's shape does not show it."""
        shared = tensor.shape[:1] == (1,)  # A tensor for all rows, such as positions.
        if not (tensor.numel() and tensor.ndim) or (tensor.shape[0] % self.batch and not shared):
            return None
        part = tensor[0] if shared else tensor.unflatten(0, (self.batch, -1))[self.index].squeeze(0)
        axis = next((axis for axis, size in enumerate(part.shape) if size == self.width), None)
        return (part if axis is None else part.narrow(axis, self.start, self.length)).cpu().double().clone()


def locate_row(tensor: torch.Tensor, row: Row) -> RowLocation | None:
    """Return where a batch holds a row's tokens, or its first feature; `None` if it does not.

    Of a row with several texts, its longest one is looked for, in a batch of texts or of rows.
    """
    row = split_pair(row)[0]
    texts = row.get("input_ids")
    if texts is None:
        content = next(iter(extract_features(row).values()), None)
    elif len(texts) and not isinstance(texts[0], int) and torch.as_tensor(texts[0]).ndim:
        content, tensor = _select_text(texts, tensor)
    else:
        content = torch.as_tensor(texts)
    if content is None or tensor.ndim != content.ndim + 1:
        return None
    flat = tensor.flatten(1)
    content = content.flatten().to(tensor.device)
    if flat.shape[1] < len(content) or tensor.is_floating_point() != content.is_floating_point():
        return None
    matches = (flat.unfold(1, len(content), 1) == content).all(dim=-1).nonzero().tolist()
    sizes = {"batch": len(flat), "length": len(content), "width": flat.shape[1]}
    return next((RowLocation(index=index, start=start, **sizes) for index, start in matches), None)


def _select_text(texts: Sequence[Any], tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the longest of a row's texts, and what `tensor` holds of that text of each row, `[batch, tokens]`."""
    longest = max(range(len(texts)), key=lambda choice: len(texts[choice]))
    if tensor.ndim == 2 and len(tensor) % len(texts) == 0:
        tensor = tensor.unflatten(0, (-1, len(texts)))
    has_texts = tensor.ndim == 3 and tensor.shape[1] == len(texts)
    return torch.as_tensor(texts[longest]), tensor[:, longest] if has_texts else tensor


def iterate_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in `value`, however deep in lists, tuples and mappings."""
    # Complex tensors, which some rotary embeddings pass, cannot be compared by size.
    if isinstance(value, torch.Tensor) and not value.is_complex():
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from iterate_tensors(part)


def parts_differ(before: Parts, after: Parts) -> bool | None:
    """Return whether a row's parts moved by more than rounding; `None` if no part kept its shape."""
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a is not None and b is not None]
    pairs = [(a, b) for a, b in pairs if a.shape == b.shape]
    return any(_moved(a, b) for a, b in pairs) if pairs else None


def _moved(before: torch.Tensor, after: torch.Tensor) -> bool:
    tolerance = ROUNDING * before.nan_to_num(0, 0, 0).abs().max().item()
    return not torch.allclose(before, after, rtol=0, atol=tolerance, equal_nan=True)


def extract_features(row: Row) -> dict[str, torch.Tensor]:
    """Return the row's fields of floats as tensors, without the labels."""
    tensors = {}
    for name, value in row.items():
        with suppress(TypeError, ValueError, RuntimeError):  # Such as a text, which is not a tensor.
            tensors[name] = torch.as_tensor(value)
    return {k: v for k, v in tensors.items() if v.ndim and v.is_floating_point() and not k.startswith("label")}
