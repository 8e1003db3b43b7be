"""Where the parameters may go: what an update does besides moving along directions.

A constraint looks at the parameters and at where a stage began, never at data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_dpzo.zo.directions import sum_of_squares
from hf_dpzo.zo.philox import CHUNK_SIZE


class Constraint:
    """No constraint, unless a subclass says otherwise."""

    # Whether it looks at parameters of before.
    is_stateful = False
    # Whether it moves them before an update.
    has_pull = False

    def capture_origin(
        self, parameters: Sequence[torch.Tensor], previous: list[torch.Tensor] | None
    ) -> list[torch.Tensor]:
        """Return what to remember when a stage begins: copies that nothing else writes to, or nothing.

        Args:
            parameters: where they are now.
            previous: what was remembered of the stage before; `None` at the beginning of the run.
        """
        return []

    def pull_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        """Take the step of a regularizer's gradient, before the update, with the learning rate of each parameter."""

    def project_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> None:
        """Bring the parameters back to where they may be, after the update."""


@dataclass(frozen=True, kw_only=True)
class QuadraticAnchor(Constraint):
    """The gradient of `strength / 2 * ||theta - theta_s||**2`, where theta_s is where the stage began.

    Costs a copy of the trained parameters.

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
        """Where the stage begins."""
        return [parameter.detach().clone() for parameter in parameters]

    def pull_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        """Go a share `rate * strength` of the way back."""
        for parameter, start, rate in zip(parameters, origin, rates, strict=True):
            parameter.lerp_(start, rate * self.strength)


@dataclass(frozen=True, kw_only=True)
class Ball(Constraint):
    """Projection onto the ball of `radius` around the initial parameters, all of them as one vector.

    Costs a copy of the trained parameters.

    Args:
        radius: in units of the parameters, L2.

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
        """Where the run began."""
        return [parameter.detach().clone() for parameter in parameters] if previous is None else previous

    def project_(self, parameters: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> None:
        """Scale the way from the origin down to `radius`, if it is longer."""
        distance = math.sqrt(sum(_squares(p, start) for p, start in zip(parameters, origin, strict=True)))
        if distance > self.radius:
            for parameter, start in zip(parameters, origin, strict=True):
                parameter.lerp_(start, 1 - self.radius / distance)


def _squares(parameter: torch.Tensor, start: torch.Tensor) -> float:
    """The squared distance between two tensors, chunk by chunk."""
    chunks = zip(parameter.detach().view(-1).split(CHUNK_SIZE), start.view(-1).split(CHUNK_SIZE), strict=True)
    return sum(sum_of_squares((a.double() - b.double()).cpu()) for a, b in chunks)
