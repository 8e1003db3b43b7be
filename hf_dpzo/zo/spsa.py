"""Zeroth-order estimation (SPSA): the probe points of a step, and the comparison of each example's losses there.

The coefficients are SENSITIVE: one row for each example, which may go to `Mechanism.release` and nowhere else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hf_dpzo.zo.walk import THETA, ProbePoint


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(ABC):
    """Estimates each example's gradient along K directions, by n-SPSA (Spall 1992; Malladi et al. 2023, definition 1).

    Args:
        smoothing: mu, the distance from theta to a probe point, in units of z.
        num_directions: K, the number of directions.
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
        """Return each example's coefficients, float64 `[rows, K]`. SENSITIVE.

        The estimated gradient of an example's loss is `sum_k coefficients[k] * z_k`.

        Args:
            losses: each example's loss at all points, float64 `[rows, points]`. SENSITIVE.
        """

    @property
    def forward_passes(self) -> int:
        """The number of forward passes of a step, one for each probe point."""
        return len(self.points)


@dataclass(frozen=True, kw_only=True)
class CentralDifference(FiniteDifference):
    """Compares both sides of theta: `(loss(theta + mu z_k) - loss(theta - mu z_k)) / (2 mu K)`.

    Costs 2K forward passes. The curvature along z_k cancels.
    """

    @property
    def span(self) -> float:
        """The distance `2 mu` between the two sides of theta."""
        return 2 * self.smoothing

    @property
    def points(self) -> tuple[ProbePoint, ...]:
        """The points `theta + mu z_k` and `theta - mu z_k`, direction by direction."""
        sides = (+self.smoothing, -self.smoothing)
        return tuple(ProbePoint(direction=k, position=side) for k in range(self.num_directions) for side in sides)

    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """Return `(loss(theta + mu z_k) - loss(theta - mu z_k)) / (2 mu K)`. See `FiniteDifference.coefficients`."""
        return (losses[:, ::2] - losses[:, 1::2]) / (self.span * self.num_directions)


@dataclass(frozen=True, kw_only=True)
class ForwardDifference(FiniteDifference):
    """Compares one side of theta with theta itself: `(loss(theta + mu z_k) - loss(theta)) / (mu K)`.

    Costs K + 1 forward passes, because all directions share the loss at theta: half the cost for large K. The price is
    a bias of `mu / 2 * z_k' H z_k` in each quotient, where H is the Hessian. A small mu makes the bias small, but the
    difference of losses too, and float32 holds about seven digits of each loss.
    """

    @property
    def span(self) -> float:
        """The distance `mu` from theta to a point beside it."""
        return self.smoothing

    @property
    def points(self) -> tuple[ProbePoint, ...]:
        """Theta itself, then `theta + mu z_k` for each direction."""
        along = (ProbePoint(direction=k, position=self.smoothing) for k in range(self.num_directions))
        return (THETA, *along)

    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """Return `(loss(theta + mu z_k) - loss(theta)) / (mu K)`. See `FiniteDifference.coefficients`."""
        return (losses[:, 1:] - losses[:, :1]) / (self.span * self.num_directions)


DIFFERENCES: dict[str, type[FiniteDifference]] = {"central": CentralDifference, "forward": ForwardDifference}
