"""Constraints on where the parameters may go: what a step does besides moving along directions.

A constraint sees the parameters and where a stage or the run began, never the data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_dpzo.zo.philox import CHUNK_SIZE
from hf_dpzo.zo.squares import sum_of_squares


class Constraint:
    """Limits where the parameters may go; by default, nowhere."""

    # Whether the constraint depends on earlier parameters.
    is_stateful = False
    # Whether it moves the parameters before an update.
    has_pull = False

    def capture_origin(
        self, parameters: Sequence[torch.Tensor], previous: list[torch.Tensor] | None
    ) -> list[torch.Tensor]:
        """Return the tensors to remember when a stage begins, as copies that nothing else writes to; by default none.

        Args:
            parameters: the parameters as the stage begins.
            previous: the tensors that were remembered for the stage before; `None` when the run begins.
        """
        return []

    def pull_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        """Take a step along a regularizer's gradient, before the update; by default none.

        Args:
            parameters: the parameters, changed in place.
            origin: the tensors that `capture_origin` returned.
            rates: the learning rate of each parameter.
        """

    def project_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> None:
        """Bring the parameters back to where they may be, after the update; by default leave them.

        Args:
            parameters: the parameters, changed in place.
            origin: the tensors that `capture_origin` returned.
        """


@dataclass(frozen=True, kw_only=True)
class QuadraticAnchor(Constraint):
    """Pulls towards where the stage began, by the gradient of `strength / 2 * ||theta - theta_s||**2`.

    Here theta_s are the parameters as the stage began. Costs a copy of the trained parameters.

    Args:
        strength: rho (Liu et al. 2025).

    >>> theta = torch.zeros(1)
    >>> anchor = QuadraticAnchor(strength=0.5)
    >>> origin = anchor.capture_origin([theta], None)
    >>> anchor.pull_([theta.add_(8.0)], origin, rates=[0.25])
    >>> theta
    tensor([7.])
    """

    is_stateful = True
    has_pull = True

    strength: float

    def capture_origin(
        self, parameters: Sequence[torch.Tensor], previous: list[torch.Tensor] | None
    ) -> list[torch.Tensor]:
        """Return copies of the parameters as the stage begins."""
        return [parameter.detach().clone() for parameter in parameters]

    def pull_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        """Move each parameter by the share `rate * strength` of its way back to `origin`."""
        for parameter, start, rate in zip(parameters, origin, rates, strict=True):
            parameter.lerp_(start, rate * self.strength)


@dataclass(frozen=True, kw_only=True)
class Ball(Constraint):
    """Projects onto the L2 ball around the initial parameters, taken together as one vector.

    Costs a copy of the trained parameters.

    Args:
        radius: the ball's radius, in units of the parameters.

    >>> theta = [torch.tensor([0.0]), torch.tensor([0.0])]
    >>> ball = Ball(radius=5.0)
    >>> origin = ball.capture_origin(theta, None)
    >>> ball.project_([theta[0].add_(6.0), theta[1].add_(8.0)], origin)
    >>> theta
    [tensor([3.]), tensor([4.])]
    """

    is_stateful = True

    radius: float

    def capture_origin(
        self, parameters: Sequence[torch.Tensor], previous: list[torch.Tensor] | None
    ) -> list[torch.Tensor]:
        """Return copies of the parameters as the run begins, and the same copies at each later stage."""
        return [parameter.detach().clone() for parameter in parameters] if previous is None else previous

    def project_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> None:
        """Shorten the vector from `origin` to the parameters to `radius`, if it is longer."""
        distance = math.sqrt(sum(_squared_distance(p, start) for p, start in zip(parameters, origin, strict=True)))
        if distance > self.radius:
            for parameter, start in zip(parameters, origin, strict=True):
                parameter.lerp_(start, 1 - self.radius / distance)


def _squared_distance(parameter: torch.Tensor, start: torch.Tensor) -> float:
    """Return the squared L2 distance between two tensors, computed chunk by chunk."""
    chunks = zip(parameter.detach().view(-1).split(CHUNK_SIZE), start.view(-1).split(CHUNK_SIZE), strict=True)
    return sum(sum_of_squares((a.double() - b.double()).cpu()) for a, b in chunks)
