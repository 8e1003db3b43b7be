"""A seal on the trained parameters, broken by whatever moves them besides a step."""

from collections.abc import Callable, Sequence

import torch

from hf_dpzo.models.state import checksum_each


class BrokenSealError(RuntimeError):
    """Something other than a step has changed what is trained."""


class Seal:
    """Notices whether parameters have changed since they were sealed.

    Args:
        parameters: a function that returns the parameters, which wrappers may exchange.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> seal = Seal(lambda: [weight])
    >>> seal.apply()
    >>> seal.is_broken()
    False
    >>> _ = weight.data.add_(1)
    >>> seal.is_broken()
    True
    """

    def __init__(self, parameters: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._parameters = parameters
        self._checksums: list[int] = []

    def apply(self) -> None:
        """Seal the present values."""
        self._checksums = checksum_each(self._parameters())

    def is_broken(self) -> bool:
        """Return whether the values have changed since they were sealed."""
        return checksum_each(self._parameters()) != self._checksums

    def check(self) -> None:
        """Raise `BrokenSealError` if the values have changed since they were sealed."""
        if self.is_broken():
            raise BrokenSealError(
                "model: something other than a step has changed what is trained, such as a callback, a hook or an "
                "evaluation, and the log does not lead to it; keep it constant, or go on with "
                "resume_from_checkpoint=True."
            )
