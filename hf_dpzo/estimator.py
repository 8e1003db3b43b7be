"""Zeroth-order estimation: walk the parameters through probe points and compare each example's losses there.

What comes out is SENSITIVE: one row of numbers for each example, on its way to `Mechanism.release` and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hf_dpzo.perturbation import Directions


class Walk(ABC):
    """Moves parameters along one direction of one step. It starts at position 0 and, as a context, ends there.

    Args:
        parameters: the trainable parameters, in the order of `directions.sizes`.
        directions: where the direction comes from.
        step: the step, from 0.
        direction: which of the step's directions, from 0.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], directions: Directions, *, step: int, direction: int
    ) -> None:
        self._parameters, self._directions = parameters, directions
        self._step, self._direction = step, direction
        self._position = 0.0

    @abstractmethod
    def to(self, position: float) -> None:
        """Set the parameters to `theta + position * z`."""

    def __enter__(self) -> "Walk":
        return self

    def __exit__(self, *_: object) -> None:
        self.to(0.0)

    def _add(self, distance: float) -> None:
        for index, parameter in enumerate(self._parameters):
            self._directions.add_(parameter, index=index, step=self._step, weights={self._direction: distance})


class AddingWalk(Walk):
    """Goes back the way it came, and keeps no copy. Rounding leaves theta changed by about one unit in the last place.

    What it leaves behind depends on public values alone, so a replay that makes the same moves ends at the same bits.
    That is why an empty batch is walked too: whether a batch was empty is not public.
    """

    def to(self, position: float) -> None:
        """Set the parameters to `theta + position * z`."""
        self._add(position - self._position)
        self._position = position


class CopyingWalk(Walk):
    """Starts each move from a copy, so it ends at exactly theta. For small trainable sets, such as adapters."""

    def __enter__(self) -> "Walk":
        self._copies = [parameter.detach().clone() for parameter in self._parameters]
        return self

    @torch.no_grad()
    def to(self, position: float) -> None:
        """Set the parameters to `theta + position * z`."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(copy)
        if position != 0.0:
            self._add(position)


@dataclass(frozen=True, kw_only=True)
class Difference(ABC):
    """The coefficients of n-SPSA (Spall 1992; Malladi et al. 2023, definition 1), for each example by itself.

    Args:
        smoothing: mu, the distance from theta to a probe point, in units of z.
        num_directions: K.
    """

    smoothing: float
    num_directions: int

    @property
    @abstractmethod
    def span(self) -> float:
        """The distance between the two points whose losses are compared, in units of z."""

    @property
    @abstractmethod
    def forward_passes(self) -> int:
        """How often a step evaluates its batch."""

    @abstractmethod
    def differences(self, walk: Callable[[int], Walk], losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return coefficients, float64 `[batch, K]`. SENSITIVE.

        The sum over k of coefficient times z_k is the estimated gradient of an example's loss.

        Args:
            walk: makes the walk along the direction of that number.
            losses: evaluates the batch where the parameters are, float32 `[batch]`.
        """


@dataclass(frozen=True, kw_only=True)
class CentralDifference(Difference):
    """`(loss(theta + mu z_k) - loss(theta - mu z_k)) / (2 mu K)`. The curvature along z_k cancels."""

    @property
    def span(self) -> float:
        """`2 mu`."""
        return 2 * self.smoothing

    @property
    def forward_passes(self) -> int:
        """`2K`."""
        return 2 * self.num_directions

    def differences(self, walk: Callable[[int], Walk], losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        """As in `Difference`."""
        columns = []
        for direction in range(self.num_directions):
            with walk(direction) as along:
                along.to(+self.smoothing)
                plus = losses().double()
                along.to(-self.smoothing)
                minus = losses().double()
            columns.append((plus - minus) / (self.span * self.num_directions))
        return torch.stack(columns, dim=1)


@dataclass(frozen=True, kw_only=True)
class ForwardDifference(Difference):
    """`(loss(theta + mu z_k) - loss(theta)) / (mu K)`: all K share one loss, which halves the cost of large K.

    The price is a bias of `mu / 2 * z_k' H z_k` in each quotient, where H is the Hessian. For small mu it is small, but
    so is the difference then, and float32 has about seven digits of each loss.
    """

    @property
    def span(self) -> float:
        """`mu`."""
        return self.smoothing

    @property
    def forward_passes(self) -> int:
        """`K + 1`."""
        return self.num_directions + 1

    def differences(self, walk: Callable[[int], Walk], losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        """As in `Difference`."""
        here = losses().double()
        columns = []
        for direction in range(self.num_directions):
            with walk(direction) as along:
                along.to(self.smoothing)
                columns.append((losses().double() - here) / (self.span * self.num_directions))
        return torch.stack(columns, dim=1)


DIFFERENCES: dict[str, type[Difference]] = {"central": CentralDifference, "forward": ForwardDifference}
