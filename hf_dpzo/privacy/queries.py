"""Queries: the facts that determine what one release costs, and the events that dp-accounting knows them as."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import dp_accounting


# The scale of the noise must be an integer below 2**53, in lattice steps of 2**-40 clip norms.
MAX_NOISE_MULTIPLIER = 1 << 13


@dataclass(frozen=True, kw_only=True)
class SampledQuery(ABC):
    """One release of a noisy sum over a batch that each unit joins independently.

    Args:
        noise_multiplier: the noise's scale over the sensitivity of the sum.
        sampling_rate: the probability with which each unit joins the batch; 1 for all of the data.
    """

    # Below this multiplier a PLD needs minutes and gigabytes.
    min_pld_noise: ClassVar[float]

    noise_multiplier: float
    sampling_rate: float

    def __post_init__(self) -> None:
        # dp-accounting 0.6.0 silently under-reports some events whose multiplier is an int or a float32, and calls a
        # NaN multiplier epsilon = 0. Remove the conversion when its constructors validate.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sampling_rate", float(self.sampling_rate))
        if not 0 < self.noise_multiplier < MAX_NOISE_MULTIPLIER:
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier:g}: it must lie between 0 and {MAX_NOISE_MULTIPLIER}, from "
                "where on noise is not exact; correct it, or raise target_epsilon."
            )
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate={self.sampling_rate}: it must lie in (0, 1].")

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The release as an event of dp-accounting."""
        if self.sampling_rate == 1:
            return self._noise_event
        return dp_accounting.PoissonSampledDpEvent(self.sampling_rate, self._noise_event)

    @property
    @abstractmethod
    def _noise_event(self) -> dp_accounting.DpEvent:
        """The release as an event, if every unit were in the batch."""


@dataclass(frozen=True, kw_only=True)
class GaussianQuery(SampledQuery):
    """One release with Gaussian noise.

    The discrete Gaussian on a lattice of 2**40 steps is accounted as the continuous one. It satisfies the same zCDP,
    and the densities differ by a relative 1e-25.

    Args:
        noise_multiplier: the noise's standard deviation over the L2 sensitivity of the sum.
        sampling_rate: the probability with which each unit joins the batch; 1 for all of the data.

    Raises:
        ValueError: `sampling_rate` is not in (0, 1], or `noise_multiplier` is not between 0 and 8192.

    >>> GaussianQuery(noise_multiplier=1, sampling_rate=0.01).event
    PoissonSampledDpEvent(sampling_probability=0.01, event=GaussianDpEvent(noise_multiplier=1.0))
    """

    min_pld_noise: ClassVar[float] = 0.2

    @property
    def _noise_event(self) -> dp_accounting.DpEvent:
        return dp_accounting.GaussianDpEvent(self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class LaplaceQuery(SampledQuery):
    """One release with Laplace noise.

    Args:
        noise_multiplier: Laplace's b over the L1 sensitivity of the sum.
        sampling_rate: the probability with which each unit joins the batch; 1 for all of the data.

    Raises:
        ValueError: `sampling_rate` is not in (0, 1], or `noise_multiplier` is not between 0 and 8192.

    >>> round(LaplaceQuery(noise_multiplier=4.4734, sampling_rate=0.016).pure_epsilon(1000), 2)
    4.0
    """

    min_pld_noise: ClassVar[float] = 0.05

    def pure_epsilon(self, steps: int) -> float:
        """Return epsilon at delta 0 for `steps` releases: amplified by sampling (Balle et al. 2018), then added up."""
        loss = 1 / self.noise_multiplier
        q = self.sampling_rate
        if loss < 1:
            return steps * math.log1p(q * math.expm1(loss))
        # The same, written so that exp cannot overflow.
        return steps * (loss + math.log(q + (1 - q) * math.exp(-loss)))

    @property
    def _noise_event(self) -> dp_accounting.DpEvent:
        return dp_accounting.LaplaceDpEvent(self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class NonPrivateQuery:
    """One release without noise, which no epsilon describes.

    >>> from hf_dpzo.privacy import Budget
    >>> Budget(query=NonPrivateQuery(), planned_steps=10, delta=None).private
    False
    """

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The release as an event of dp-accounting."""
        return dp_accounting.NonPrivateDpEvent()


Query = GaussianQuery | LaplaceQuery | NonPrivateQuery


Releases = tuple[tuple[Query, int], ...]


QUERIES: dict[str, type[GaussianQuery] | type[LaplaceQuery]] = {"gaussian": GaussianQuery, "laplace": LaplaceQuery}


# By the names that logs, statements and ledgers keep.
QUERY_CLASSES = {query_class.__name__: query_class for query_class in QUERIES.values()}


def count_releases(releases: Releases) -> int:
    """Return the number of releases, repetitions included.

    >>> count_releases(((NonPrivateQuery(), 3),))
    3
    """
    return sum(count for _, count in releases)
