"""What becomes of released coefficients: the update that they make.

Released values are public. Momentum, Adam, dividing by their spread: all of it is post-processing, and free.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Update:
    """Descent as plain as it is, unless a subclass says otherwise."""

    # The fewest directions a step that it can work with.
    min_directions = 1
    # Whether it depends on coefficients received before.
    is_stateful = False

    def scale(self, coefficients: Sequence[float]) -> list[float]:
        """Return the coefficients to move along, given the released ones of a step."""
        return list(coefficients)

    def build_inner_optimizer(self, groups: Sequence[dict]) -> torch.optim.Optimizer | None:
        """Return an optimizer that takes the estimated gradient as a dense one, or `None` to add directions in place.

        Args:
            groups: the parameter groups; the learning rate is set before each step.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class SGD(Update):
    """`theta -= lr * sum_k c_k z_k`. Keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class Momentum(Update):
    """Heavy-ball momentum, torch's: `v = momentum * v + sum_k c_k z_k; theta -= lr * v`.

    Keeps one number for each trained parameter, so it is for adapters.

    Args:
        momentum: how much of the velocity a step keeps.
    """

    is_stateful = True

    momentum: float = 0.9

    def build_inner_optimizer(self, groups: Sequence[dict]) -> torch.optim.Optimizer:
        """`torch.optim.SGD`."""
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)


@dataclass(frozen=True, kw_only=True)
class Adam(Update):
    """Adam (Kingma and Ba 2015) on the estimated gradient `sum_k c_k z_k`; MeZO-Adam, for any method.

    Keeps two numbers for each trained parameter, so it is for adapters.

    Args:
        betas: decay of the two moments.
        epsilon: added to the root of the second.
    """

    is_stateful = True

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def build_inner_optimizer(self, groups: Sequence[dict]) -> torch.optim.Optimizer:
        """`torch.optim.Adam`."""
        return torch.optim.Adam(groups, lr=0.0, betas=self.betas, eps=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class NormalizedSGD(Update):
    """Descent with coefficients in units of their own spread: `theta -= lr * sum_k (c_k / std_j c_j) z_k`.

    The idea is that of Dang et al. 2026 (FZOO), who divide by the spread of the losses; that is a function of the data
    which nobody has released. This is the spread of the K coefficients that were released, noise included.

    >>> NormalizedSGD().scale([3.0, 1.0, 2.0])
    [3.0, 1.0, 2.0]
    >>> NormalizedSGD().scale([300.0, 100.0, 200.0])
    [3.0, 1.0, 2.0]
    """

    min_directions = 2

    def scale(self, coefficients: Sequence[float]) -> list[float]:
        """Divide by the sample standard deviation; where there is none, stay."""
        spread = statistics.stdev(coefficients)
        return [coefficient / spread if spread > 0 else 0.0 for coefficient in coefficients]


UPDATES: dict[str, type[Update]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam, "normalized": NormalizedSGD}
