"""A model that is as it was after something was tried on it, whatever that wrote."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._dynamo import OptimizedModule
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dpzo.distributed.sharding import to_local
from hf_dpzo.models.precision import inner_tensors
from hf_dpzo.models.registries import PlainState, list_plain_owners
from hf_dpzo.models.state import ModelState, name_tensors, put_back


# Models up to this size, in bytes, are copied as a whole, which takes less time than watching for writes.
MAX_WHOLE_COPY_BYTES = 1 << 26


@contextmanager
def preserved(model: torch.nn.Module) -> Iterator[ModelState]:
    """Put `model` into evaluation mode inside the context, and leave its tensors and configurations as they were.

    Yields its state, which tells at the end of the context what was changed. A small model is copied as a whole. Of a
    large one only what is written into is copied, just before. That sees all writes that torch carries out itself.
    """
    modes = {module: module.training for module in model.modules()}
    state = ModelState(model, moving=())
    plain = [PlainState.capture(owner) for owner in list_plain_owners(model)]
    copies = _CopyOnWrite(name_tensors(model).values())
    model.eval()
    try:
        with ExitStack() as watch:
            # What is compiled runs no operation that could be watched.
            if isinstance(model, OptimizedModule) or copies.total_bytes <= MAX_WHOLE_COPY_BYTES:
                copies.copy_all()
            else:
                watch.enter_context(copies)
            yield state
    finally:
        for module, mode in modes.items():
            module.training = mode
        state.restore_buffers()
        copies.put_back()
        for plain_state in plain:
            plain_state.restore()


class _CopyOnWrite(TorchDispatchMode):
    """Copies tensors before an operation writes into them."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._plain = {id(part): part for tensor in tensors for part in inner_tensors(to_local(tensor.detach()))}
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        for part in self._plain.values():
            self._by_storage.setdefault(part.untyped_storage().data_ptr(), []).append(part)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.total_bytes = sum(part.nbytes for part in self._plain.values())

    def copy_all(self) -> None:
        for storage in list(self._by_storage):
            self._copy(storage)

    def put_back(self) -> None:
        for part, copy in self._copies:
            put_back(part, copy)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._copy_written(named.get(argument.name))
        return func(*args, **kwargs)

    def _copy_written(self, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                self._copy(tensor.untyped_storage().data_ptr())

    def _copy(self, storage: int) -> None:
        self._copies += [(part, part.clone()) for part in self._by_storage.pop(storage, ())]
