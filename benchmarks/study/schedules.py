"""Learning rates from step to step, by public numbers alone."""

import math
from collections.abc import Sequence

import torch


class Linear:
    """Falls from the first rate to zero.

    Args:
        rate: the learning rate of the first step.
        steps: the number of steps.
        head: what is trained.
        smoothing: the distance of a probe point, in directions.
    """

    def __init__(self, *, rate: float, steps: int, head: torch.nn.Module, smoothing: float) -> None:
        self.rate, self.steps, self.head, self.smoothing = rate, steps, head, smoothing

    def choose(self, step: int, coefficients: Sequence[float]) -> float:
        """Return the rate of `step`, by the coefficients that it released."""
        return self.rate * (1 - step / self.steps)


class Constant(Linear):
    """Stays as it is."""

    def choose(self, step: int, coefficients: Sequence[float]) -> float:
        """Return the rate."""
        return self.rate


class DistanceOverGradients(Linear):
    """The largest distance from the beginning over the root of all squared gradients: DoG (Ivgi and others 2023).

    It begins with the distance of a probe point, and takes no rate.
    """

    def __init__(self, *, rate: float, steps: int, head: torch.nn.Module, smoothing: float) -> None:
        super().__init__(rate=rate, steps=steps, head=head, smoothing=smoothing)
        self._beginning = self._flatten()
        self._size = len(self._beginning)
        self._farthest = smoothing * math.sqrt(self._size)
        self._squares = 0.0

    def choose(self, step: int, coefficients: Sequence[float]) -> float:
        """Return the rate of `step`. Directions have entries of 1 and -1, and are nearly orthogonal."""
        self._farthest = max(self._farthest, (self._flatten() - self._beginning).norm().item())
        self._squares += self._size * sum(coefficient**2 for coefficient in coefficients)
        return self._farthest / math.sqrt(self._squares)

    def _flatten(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.head.parameters()])
