"""Secret randomness: the noise of a release and the membership of a batch.

Everything here comes from the operating system's cryptographic generator: the noise through OpenDP's exact samplers,
the membership through `os.urandom`. Nothing takes a seed, keeps a state or can be replayed. Nothing shares a type or a
generator with the public directions of `zo/directions.py`.
"""

import os
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import opendp.prelude as opendp


# OpenDP keeps constructors whose proofs its committee has not yet vetted behind this switch.
opendp.enable_features("contrib")


@dataclass(frozen=True, kw_only=True)
class DiscreteNoise(ABC):
    """Adds exact noise over the integers to a vector of integers.

    Args:
        scale: the scale of the distribution, in lattice steps. It is an integer, so that it is exact wherever it is
            written down.
    """

    scale: int

    def __post_init__(self) -> None:
        if not 0 < self.scale < 2**53:
            raise ValueError(f"scale={self.scale}: the noise needs an integer scale between 1 and 2**53 - 1.")

    def add(self, values: list[int]) -> list[int]:
        """Return `values` plus one independent draw for each of them."""
        return self._measurement(values)

    @property
    @abstractmethod
    def _measurement(self) -> opendp.Measurement:
        """The sampler of OpenDP, which adds the noise."""


@dataclass(frozen=True, kw_only=True)
class DiscreteGaussian(DiscreteNoise):
    """Adds discrete Gaussian noise (Canonne, Kamath and Steinke 2020). `scale` is its standard deviation.

    Guarantee: for two vectors at L2 distance `r`, the outputs satisfy `r**2 / (2 * scale**2)`-zCDP, in any dimension.

    >>> noisy = DiscreteGaussian(scale=1 << 20).add([0, 10])
    >>> len(noisy), all(isinstance(value, int) for value in noisy)
    (2, True)
    """

    @cached_property
    def _measurement(self) -> opendp.Measurement:
        domain = opendp.vector_domain(opendp.atom_domain(T="i64"))
        return opendp.m.make_gaussian(domain, opendp.l2_distance(T="f64"), scale=float(self.scale))


@dataclass(frozen=True, kw_only=True)
class DiscreteLaplace(DiscreteNoise):
    """Adds discrete Laplace noise (Ghosh, Roughgarden and Sundararajan 2009).

    Its standard deviation is about `sqrt(2) * scale`.

    Guarantee: for two vectors at L1 distance `r`, the outputs satisfy `(r / scale)`-DP with delta 0, in any dimension.

    >>> len(DiscreteLaplace(scale=1 << 20).add([0, 10]))
    2
    """

    @cached_property
    def _measurement(self) -> opendp.Measurement:
        domain = opendp.vector_domain(opendp.atom_domain(T="i64"))
        return opendp.m.make_laplace(domain, opendp.l1_distance(T="i64"), scale=float(self.scale))


@dataclass(frozen=True, kw_only=True)
class BernoulliSampler:
    """Decides for each of `size` rows, independently and secretly, whether it joins a batch.

    Args:
        size: the number of rows.
        rate: the probability with which each row joins, in (0, 1].

    >>> BernoulliSampler(size=3, rate=1.0).draw().tolist()
    [True, True, True]
    """

    size: int
    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate={self.rate}: a sampling rate lies in (0, 1].")

    def draw(self) -> np.ndarray:
        """Return a fresh draw, booleans `[size]`. SENSITIVE."""
        if self.rate == 1:
            return np.ones(self.size, dtype=bool)
        # A uniform 64-bit number lies below this with a probability of at most `rate`, and less by under 2**-64.
        threshold = np.uint64(int(self.rate * 2**64))
        return np.frombuffer(os.urandom(8 * self.size), dtype=np.uint64) < threshold


def choose_subset(count: int, size: int) -> list[int]:
    """Choose `size` of the numbers below `count`, secretly, so that each subset is equally likely.

    >>> sorted(choose_subset(3, 3))
    [0, 1, 2]
    """
    return secrets.SystemRandom().sample(range(count), size)


def draw_keys(count: int) -> np.ndarray:
    """Draw secret random keys, int64 `[count]`, each of them any number below 2**63 with equal probability.

    >>> draw_keys(2).shape
    (2,)
    """
    return (np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(1)).astype(np.int64)
