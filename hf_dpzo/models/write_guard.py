"""A guard that lets no operation change the tensors of a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from hf_dpzo.models.precision import inner_tensors


class ModelChangedError(RuntimeError):
    """Something other than a step of the optimizer has changed a model, or was about to.

    Args:
        name: the name of the tensor that was changed, or a phrase for it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"model: evaluating rows changes {name}, which would carry rows into what is saved; keep everything "
            "constant in evaluation mode."
        )
        self.name = name


class WriteGuard(TorchDispatchMode):
    """Undoes what an operation writes into a tensor of a model, and raises, inside its context.

    It sees every operation that torch carries out itself, also on a tensor's `data`; not what NumPy writes into memory
    that it shares, and not what runs inside a compiled model. Only a tensor that is written into is copied.

    Args:
        tensors: the tensors by their names.

    >>> weight = torch.ones(2)
    >>> with WriteGuard({"weight": weight}):
    ...     weight.data.add_(1)
    Traceback (most recent call last):
    hf_dpzo.models.write_guard.ModelChangedError: model: evaluating rows changes weight, which would carry rows ...
    >>> weight
    tensor([1., 1.])
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors = dict(tensors)
        self._places: list[tuple[int, bool]] = []
        self.look()

    def look(self) -> None:
        """Look where the tensors are, if they have been moved to other memory since."""
        places = _list_places(self._tensors.values())
        if places == self._places:
            return
        self._places = places
        self._originals = [tensor.detach() for tensor in self._tensors.values()]
        self._stored: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, original in zip(self._tensors, self._originals, strict=True):
            for part in inner_tensors(original):
                if part.numel():
                    self._stored.setdefault(part.untyped_storage().data_ptr(), []).append((name, part))

    def put_back_exchanged(self) -> str | None:
        """Put tensors whose memory or kind was exchanged back to where they were; return the name of one of them.

        Assigning to `data`, and swapping, are no operations that a guard sees.
        """
        if _list_places(self._tensors.values()) == self._places:
            return None
        changed = []
        for (name, tensor), original, place in zip(self._tensors.items(), self._originals, self._places, strict=True):
            if _list_places([tensor]) != [place]:
                tensor.data = original
                tensor.requires_grad_(place[1])
                changed.append(name)
        return changed[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        places = list_written(func)
        if not places:  # Nearly all operations, and there are a thousand in a pass.
            return func(*args, **kwargs)
        written = _pick(places, args, kwargs)
        held = [pair for tensor in written for pair in self._stored.get(tensor.untyped_storage().data_ptr(), ())]
        copies = [(name, part, part.clone()) for name, part in held]
        result = func(*args, **kwargs)
        changed = [name for name, part, copy in copies if put_back(part, copy)]
        if changed:
            raise ModelChangedError(changed[0])
        return result


@torch.no_grad()
def put_back(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    """Give `tensor` the shape and the bits of `copy`, and return whether it had others."""
    if tensor.shape == copy.shape and tensor.dtype == copy.dtype:
        if torch.equal(_view_octets(tensor), _view_octets(copy)):
            return False
        tensor.copy_(copy)
    else:
        tensor.data = copy.clone()
    return True


def _view_octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _list_places(tensors: Iterable[torch.Tensor]) -> list[tuple[int, bool]]:
    """Return where each tensor is, and whether it is to be trained; the place of a packed one is its identity."""
    return [(id(tensor) if _is_packed(tensor) else tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]


def _is_packed(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` consists of other tensors, and has no memory of its own."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(tensor)


@cache
def list_written(func: Callable) -> tuple[tuple[int, str], ...]:
    """Return the positions and names of the arguments that an operation writes into.

    >>> list_written(torch.ops.aten.add_.Tensor), list_written(torch.ops.aten.add.Tensor)
    (((0, 'self'),), ())
    """
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _pick(written: tuple[tuple[int, str], ...], args: tuple, kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for index, name in written:
        value = args[index] if index < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor
