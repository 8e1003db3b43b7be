"""Updates: the ways to move the parameters by released coefficients.

Released values are public. So momentum, Adam and division by their spread are post-processing, and cost no privacy.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Update:
    """Turns a step's released coefficients into a move of the parameters; by default, plain descent."""

    # The fewest directions per step that the update works with.
    min_directions = 1
    # Whether the update depends on the coefficients of earlier steps.
    is_stateful = False

    def scale(self, coefficients: Sequence[float]) -> list[float]:
        """Return the coefficients to move by, one for each direction, given those that a step released."""
        return list(coefficients)

    def build_inner_optimizer(self, groups: Sequence[dict]) -> torch.optim.Optimizer | None:
        """Return an optimizer that steps on a dense estimated gradient, or `None` to add directions in place.

        Args:
            groups: the parameter groups, without a learning rate, which is set before each step.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class SGD(Update):
    """Plain descent: `theta -= lr * sum_k c_k z_k`. Keeps no state."""


@dataclass(frozen=True, kw_only=True)
class Momentum(Update):
    """Heavy-ball momentum, as torch defines it: `v = momentum * v + sum_k c_k z_k; theta -= lr * v`.

    Keeps one number for each trained parameter, so it is for adapters.

    Args:
        momentum: the share of the velocity v that a step keeps.
    """

    is_stateful = True

    momentum: float = 0.9

    def build_inner_optimizer(self, groups: Sequence[dict]) -> torch.optim.Optimizer:
        """Return a `torch.optim.SGD` with momentum."""
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)


@dataclass(frozen=True, kw_only=True)
class Adam(Update):
    """Adam (Kingma and Ba 2015) on the estimated gradient `sum_k c_k z_k`: MeZO-Adam, for any method.

    Keeps two numbers for each trained parameter, so it is for adapters.

    Args:
        betas: the decay rates of the first and the second moment.
        epsilon: the number added to the root of the second moment.
    """

    is_stateful = True

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def build_inner_optimizer(self, groups: Sequence[dict]) -> torch.optim.Optimizer:
        """Return a `torch.optim.Adam`."""
        return torch.optim.Adam(groups, lr=0.0, betas=self.betas, eps=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class NormalizedSGD(Update):
    """Descent with coefficients in units of their own spread: `theta -= lr * sum_k (c_k / std_j c_j) z_k`.

    Dang et al. 2026 (FZOO) divide by the spread of the losses, which is a function of the data that is never released.
    This divides by the spread of the K released coefficients instead, noise included. Needs two directions or more.

    >>> NormalizedSGD().scale([3.0, 1.0, 2.0])
    [3.0, 1.0, 2.0]
    >>> NormalizedSGD().scale([300.0, 100.0, 200.0])
    [3.0, 1.0, 2.0]
    """

    min_directions = 2

    def scale(self, coefficients: Sequence[float]) -> list[float]:
        """Return the coefficients over their sample standard deviation, or zeros if it is zero."""
        spread = statistics.stdev(coefficients)
        return [coefficient / spread if spread > 0 else 0.0 for coefficient in coefficients]


UPDATES: dict[str, type[Update]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam, "normalized": NormalizedSGD}
