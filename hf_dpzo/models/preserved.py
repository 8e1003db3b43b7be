"""A model that is as it was after something was tried on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo import OptimizedModule

from hf_dpzo.distributed.sharding import to_local
from hf_dpzo.models.precision import inner_tensors
from hf_dpzo.models.state import ModelState, name_tensors
from hf_dpzo.models.write_guard import put_back


# Models up to this size, in bytes, are copied. Larger ones are guarded from writes instead.
MAX_WHOLE_COPY_BYTES = 1 << 26


@contextmanager
def preserved(model: torch.nn.Module) -> Iterator[ModelState]:
    """Put `model` into evaluation mode inside the context, and leave its tensors and configurations as they were.

    Yields its state, which tells at the end of the context what was changed. Operations that write into the weights of
    a model that is too large to be copied raise `ModelChangedError`, unless it is compiled: then it is copied all the
    same.
    """
    modes = {module: module.training for module in model.modules()}
    state = ModelState(model, moving=())
    plain = state.capture_plain()
    parts = [part for tensor in name_tensors(model).values() for part in inner_tensors(to_local(tensor.detach()))]
    is_small = sum(part.nbytes for part in parts) <= MAX_WHOLE_COPY_BYTES
    copies = [(part, part.clone()) for part in parts] if is_small or isinstance(model, OptimizedModule) else []
    model.eval()
    try:
        if copies:
            yield state
        else:
            with state.guarded(model):
                yield state
    finally:
        for module, mode in modes.items():
            module.training = mode
        state.restore_buffers()
        for part, copy in copies:
            put_back(part, copy)
        for plain_state in plain:
            plain_state.restore()
