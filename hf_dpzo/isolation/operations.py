"""Whether what is computed for a batch depends on the values in it, and not only on their shapes.

A mixture of experts multiplies the tokens that chose an expert together. How many others chose it decides the shape of
that product, and with it how each token's part is rounded. So rows move each other's losses by rounding, if only for
some neighbours, and no losses that happen to be equal prove the contrary.
"""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from hf_dpzo.isolation.trace import iterate_tensors


# Products whose shapes are values of a tensor, or which counts of values lead to.
_BY_VALUE = ("_grouped_mm", "_scaled_grouped_mm", "bincount", "histc")


class OperationTrace(TorchDispatchMode):
    """Records the operations that run inside its context, with the shapes of their tensors.

    >>> import torch
    >>> with OperationTrace() as trace:
    ...     _ = torch.ones(2, 3) @ torch.ones(3)
    >>> [(name, shapes[:1]) for name, shapes in trace.operations if "mv" in name]
    [('aten.mv.default', [(2, 3)])]
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        shapes = [tuple(tensor.shape) for tensor in iterate_tensors([args, kwargs or {}])]
        self.operations.append((str(func), shapes))
        return func(*args, **(kwargs or {}))

    @property
    def depends_on_values(self) -> bool:
        """Whether an operation was recorded whose inner shapes are values."""
        return any(name.split(".")[1] in _BY_VALUE for name, _ in self.operations)
