"""Zeroth-order estimation: walk the parameters through probe points and compare each example's losses there.

What comes out is SENSITIVE: one row of numbers for each example, on its way to `Mechanism.release` and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hf_dpzo.zo.walk import THETA, Point, Walk


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
    def points(self) -> tuple[Point, ...]:
        """Where a step evaluates its batch, direction by direction."""

    @abstractmethod
    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """Return coefficients, float64 `[batch, K]`, of the losses at all points, float64 `[batch, points]`."""

    @property
    def forward_passes(self) -> int:
        """How often a step evaluates its batch."""
        return len(self.points)

    def differences(
        self,
        walk: Walk,
        losses: Callable[[], torch.Tensor],
        gathered: Callable[[torch.Tensor], torch.Tensor] = lambda found: found,
    ) -> torch.Tensor:
        """Return coefficients, float64 `[batch, K]`. SENSITIVE.

        The sum over k of coefficient times z_k is the estimated gradient of an example's loss.

        Args:
            walk: through the step.
            losses: evaluates the batch where the parameters are, float32 `[batch]`.
            gathered: what becomes of the losses at all points, float64 `[batch, points]`, before they are compared.
        """
        found = []
        with walk:
            for point in self.points:
                walk.to(point)
                found.append(losses().double())
        return self.coefficients(gathered(torch.stack(found, dim=1)))

    def differences_together(
        self, losses: Callable[[Sequence[Point]], torch.Tensor], *, points_per_pass: int
    ) -> torch.Tensor:
        """As `differences`, but of several points at once, and without moving a parameter. SENSITIVE.

        Args:
            losses: evaluates the batch at `points_per_pass` points, float32 `[batch, points]`.
            points_per_pass: the same in each pass: the last one is filled up, so that its shape is that of the others.
        """
        passes = range(0, len(self.points), points_per_pass)
        filled = [*self.points, *self.points[-1:] * points_per_pass]
        found = [losses(filled[first : first + points_per_pass]).double() for first in passes]
        return self.coefficients(torch.cat(found, dim=1)[:, : len(self.points)])


@dataclass(frozen=True, kw_only=True)
class CentralDifference(Difference):
    """`(loss(theta + mu z_k) - loss(theta - mu z_k)) / (2 mu K)`. The curvature along z_k cancels. 2K points."""

    @property
    def span(self) -> float:
        """`2 mu`."""
        return 2 * self.smoothing

    @property
    def points(self) -> tuple[Point, ...]:
        """Both sides of theta along each direction."""
        sides = (+self.smoothing, -self.smoothing)
        return tuple(Point(direction=k, position=side) for k in range(self.num_directions) for side in sides)

    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """As in `Difference`."""
        return (losses[:, ::2] - losses[:, 1::2]) / (self.span * self.num_directions)


@dataclass(frozen=True, kw_only=True)
class ForwardDifference(Difference):
    """`(loss(theta + mu z_k) - loss(theta)) / (mu K)`: all K share one loss, which halves the cost of large K.

    K + 1 points. The price is a bias of `mu / 2 * z_k' H z_k` in each quotient, where H is the Hessian. For small mu it
    is small, but so is the difference then, and float32 has about seven digits of each loss.
    """

    @property
    def span(self) -> float:
        """`mu`."""
        return self.smoothing

    @property
    def points(self) -> tuple[Point, ...]:
        """Theta itself, and one point along each direction."""
        along = (Point(direction=k, position=self.smoothing) for k in range(self.num_directions))
        return (THETA, *along)

    def coefficients(self, losses: torch.Tensor) -> torch.Tensor:
        """As in `Difference`."""
        return (losses[:, 1:] - losses[:, :1]) / (self.span * self.num_directions)


DIFFERENCES: dict[str, type[Difference]] = {"central": CentralDifference, "forward": ForwardDifference}
