"""Zeroth-order estimation (SPSA): the probe points of a step, and the comparison of each example's losses there.

What comes out is SENSITIVE: one row of numbers for each example, on its way to `Mechanism.release` and nowhere else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hf_dpzo.zo.walk import THETA, ProbePoint


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(ABC):
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
    def points(self) -> tuple[ProbePoint, ...]:
        """The points at which a step evaluates its batch, direction by direction."""

    @abstractmethod
    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """Return coefficients, float64 `[rows, K]`, from the losses at all points, float64 `[rows, points]`. SENSITIVE.

        The sum over k of coefficient times z_k is the estimated gradient of an example's loss.
        """

    @property
    def forward_passes(self) -> int:
        """The number of forward passes of a step, one for each probe point."""
        return len(self.points)


@dataclass(frozen=True, kw_only=True)
class CentralDifference(FiniteDifference):
    """`(loss(theta + mu z_k) - loss(theta - mu z_k)) / (2 mu K)`. The curvature along z_k cancels. 2K points."""

    @property
    def span(self) -> float:
        """`2 mu`."""
        return 2 * self.smoothing

    @property
    def points(self) -> tuple[ProbePoint, ...]:
        """Both sides of theta along each direction."""
        sides = (+self.smoothing, -self.smoothing)
        return tuple(ProbePoint(direction=k, position=side) for k in range(self.num_directions) for side in sides)

    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """As in `FiniteDifference`."""
        return (losses[:, ::2] - losses[:, 1::2]) / (self.span * self.num_directions)


@dataclass(frozen=True, kw_only=True)
class ForwardDifference(FiniteDifference):
    """`(loss(theta + mu z_k) - loss(theta)) / (mu K)`: all K share one loss, which halves the cost of large K.

    K + 1 points. The price is a bias of `mu / 2 * z_k' H z_k` in each quotient, where H is the Hessian. For small mu it
    is small, but so is the difference then, and float32 has about seven digits of each loss.
    """

    @property
    def span(self) -> float:
        """`mu`."""
        return self.smoothing

    @property
    def points(self) -> tuple[ProbePoint, ...]:
        """Theta itself, and one point along each direction."""
        along = (ProbePoint(direction=k, position=self.smoothing) for k in range(self.num_directions))
        return (THETA, *along)

    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """As in `FiniteDifference`."""
        return (losses[:, 1:] - losses[:, :1]) / (self.span * self.num_directions)


DIFFERENCES: dict[str, type[FiniteDifference]] = {"central": CentralDifference, "forward": ForwardDifference}
