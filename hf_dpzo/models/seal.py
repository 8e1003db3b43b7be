"""A seal on the trained parameters, broken by whatever moves them besides a step."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from hf_dpzo.models.state import checksum_each


class BrokenSealError(RuntimeError):
    """Something other than a step has changed what is trained."""

    def __init__(self) -> None:
        super().__init__(
            "model: something other than a step has changed what is trained, such as a callback, a hook or an "
            "evaluation, and the log does not lead to it; keep it constant, or go on with resume_from_checkpoint=True."
        )


class Seal:
    """Notices whether parameters have changed since they were sealed.

    Args:
        parameters: a function that returns the parameters, which wrappers may exchange.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> seal = Seal(lambda: [weight])
    >>> seal.is_broken()
    False
    >>> _ = weight.data.add_(1)
    >>> seal.is_broken()
    True
    """

    def __init__(self, parameters: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._parameters = parameters
        self._checksums = checksum_each(parameters())
        self._was_broken = False

    def apply(self, known: Mapping[torch.Tensor, int] = MappingProxyType({})) -> None:
        """Seal the present values. A seal that was found broken stays so.

        Args:
            known: the checksums that a sweep has taken of the values that it left, which are not read again.
        """
        self._checksums = checksum_each(self._parameters(), known)

    def is_broken(self) -> bool:
        """Return whether the values have changed since they were sealed, now or when this was last asked."""
        self._was_broken = self._was_broken or checksum_each(self._parameters()) != self._checksums
        return self._was_broken
