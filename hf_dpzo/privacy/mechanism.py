"""The one door: sensitive rows go in, released integers come out.

Each example's row is clipped onto the lattice, the rows are summed, and one draw of discrete noise is added: always,
even to the sum of no rows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hf_dpzo.distributed.processes import SINGLE_PROCESS, Processes
from hf_dpzo.privacy.clipping import SENSITIVITY, as_rows, clip_to_lattice, lattice_scale
from hf_dpzo.privacy.noise import DiscreteGaussian, DiscreteLaplace, DiscreteNoise
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery, Query


# Whatever is released fits 64 bits, which a log has for it.
MAX_INTEGER = 2.0**62


@dataclass(frozen=True, kw_only=True)
class Release:
    """What leaves a step. From here on everything is post-processing.

    Args:
        integers: one for each direction, in lattice steps.
        unit: what a lattice step is worth, after division by the expected batch size.
    """

    integers: tuple[int, ...]
    unit: float

    @property
    def coefficients(self) -> list[float]:
        """The estimated mean coefficient of each direction."""
        return [integer * self.unit for integer in self.integers]


class Mechanism(ABC):
    """What releases a step."""

    def release(
        self,
        coefficients: torch.Tensor,
        processes: Processes = SINGLE_PROCESS,
        on_release: Callable[[tuple[int, ...]], object] = lambda integers: None,
    ) -> Release:
        """Release `coefficients`, float `[batch, K]`, summed over all processes. All of them get the same release.

        Args:
            coefficients: of this process' share of the batch.
            processes: that have the other shares.
            on_release: called with what is released; in the first process before the others are told.

        >>> mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
        >>> len(mechanism.release(torch.zeros(0, 3)).integers)
        3
        """
        total = processes.reduce_sum(self._sum_rows(coefficients))
        # The others pass zeros, and get what the first one has released.
        integers = [0] * coefficients.shape[1] if total is None else self._release_sum(total)
        if total is not None:
            on_release(tuple(integers))
        told = tuple(processes.broadcast(np.array(integers, dtype=np.int64)).tolist())
        if total is None:
            on_release(told)
        return Release(integers=told, unit=self.unit)

    @abstractmethod
    def _sum_rows(self, coefficients: torch.Tensor) -> np.ndarray:
        """What is added up over processes. SENSITIVE."""

    @abstractmethod
    def _release_sum(self, total: np.ndarray) -> list[int]:
        """What leaves, one integer for each direction, given the sum over all processes."""

    @property
    @abstractmethod
    def unit(self) -> float:
        """What a lattice step of its releases is worth."""

    @abstractmethod
    def query(self, sampling_rate: float) -> Query:
        """What one release costs when each row joins the batch with that probability."""


@dataclass(frozen=True, kw_only=True)
class IntegerSum(Mechanism):
    """The sum of clipped rows, in integers.

    Args:
        clip_norm: C, the largest norm of one example's row of K coefficients.
        expected_batch_size: the public constant that the sum is divided by.
    """

    clip_norm: float
    expected_batch_size: int

    @property
    def unit(self) -> float:
        """A clip norm is `SENSITIVITY` steps, and the sum is divided by the expected batch size."""
        return self.clip_norm / SENSITIVITY / self.expected_batch_size

    def _clip(self, coefficients: torch.Tensor) -> np.ndarray:
        """Each row on the lattice, int64 `[batch, K]`."""
        return clip_to_lattice(coefficients, self.clip_norm)

    def _sum_rows(self, coefficients: torch.Tensor) -> np.ndarray:
        """The exact sums, int64 `[K]`."""
        return self._clip(coefficients).sum(axis=0, dtype=np.int64)

    def _release_sum(self, total: np.ndarray) -> list[int]:
        return self._add_noise(total.tolist())

    @abstractmethod
    def _add_noise(self, sums: list[int]) -> list[int]:
        """What leaves, given the exact sums."""


@dataclass(frozen=True, kw_only=True)
class NoisySum(IntegerSum):
    """The sum of clipped rows with noise.

    Args:
        clip_norm: C, the largest norm of one example's row of K coefficients.
        expected_batch_size: the public constant that the sum is divided by.
        noise_multiplier: the noise's scale over the sensitivity.
    """

    noise_multiplier: float

    @property
    def noise_scale(self) -> float:
        """Of the noise that is drawn: its standard deviation, or Laplace's b, in lattice steps."""
        return float(self._noise.scale)

    def _add_noise(self, sums: list[int]) -> list[int]:
        return self._noise.add(sums)

    @property
    @abstractmethod
    def _noise(self) -> DiscreteNoise:
        """What draws the noise."""


@dataclass(frozen=True, kw_only=True)
class ClippedSum(IntegerSum):
    """The sum of jointly clipped rows, as it is. NO PRIVACY: for runs that want clipping without noise."""

    def query(self, sampling_rate: float) -> NonPrivateQuery:
        """What one release costs: everything, at any sampling rate."""
        return NonPrivateQuery()

    def _add_noise(self, sums: list[int]) -> list[int]:
        return sums


@dataclass(frozen=True, kw_only=True)
class GaussianSum(NoisySum):
    """The sum of jointly clipped rows with Gaussian noise (Bao et al. 2025, eq. 21; Zhang et al. 2024, alg. 2).

    Args:
        clip_norm: C, the largest L2 norm of one example's row of K coefficients.
        noise_multiplier: the noise's standard deviation, in clip norms, for each coefficient. Does not depend on K.
        expected_batch_size: the public constant that the sum is divided by.

    Guarantee: `query(sampling_rate)`, for neighbours that differ in one row, whatever the rows are.
    """

    def query(self, sampling_rate: float) -> GaussianQuery:
        """What one release costs. The noise is the one that is drawn: `noise_multiplier` rounded up to the lattice."""
        return GaussianQuery(noise_multiplier=self._noise.scale / SENSITIVITY, sampling_rate=sampling_rate)

    @cached_property
    def _noise(self) -> DiscreteGaussian:
        return DiscreteGaussian(scale=lattice_scale(self.noise_multiplier, SENSITIVITY))


@dataclass(frozen=True, kw_only=True)
class SeparateGaussianSum(NoisySum):
    """The sum of rows of which each coefficient was clipped by itself, with Gaussian noise (Liu et al. 2025).

    K coefficients of up to C each make a row of up to `sqrt(K) * C`, and that is the sensitivity. So K directions ask
    for `sqrt(K)` times the noise on each.

    Args:
        clip_norm: C, the largest absolute value of one example's coefficient.
        noise_multiplier: the noise's standard deviation, in units of `sqrt(K) * clip_norm`.
        num_directions: K.
        expected_batch_size: the public constant that the sum is divided by.

    Guarantee: `query(sampling_rate)`, for neighbours that differ in one row, whatever the rows are.

    >>> mechanism = SeparateGaussianSum(clip_norm=1.0, noise_multiplier=2.0, num_directions=4, expected_batch_size=8)
    >>> mechanism.query(0.5).noise_multiplier
    2.0
    """

    num_directions: int

    def query(self, sampling_rate: float) -> GaussianQuery:
        """What one release of all K costs. The noise that is drawn is this much or, by a few lattice steps, more."""
        stated = self._noise.scale / SENSITIVITY / math.sqrt(self.num_directions)
        return GaussianQuery(noise_multiplier=min(self.noise_multiplier, stated), sampling_rate=sampling_rate)

    def _clip(self, coefficients: torch.Tensor) -> np.ndarray:
        if coefficients.shape[1] != self.num_directions:
            raise ValueError(f"num_directions={self.num_directions}: a row has {coefficients.shape[1]} coefficients.")
        columns = [clip_to_lattice(column, self.clip_norm) for column in coefficients.split(1, dim=1)]
        return np.concatenate(columns, axis=1)

    @cached_property
    def _noise(self) -> DiscreteGaussian:
        scale = lattice_scale(self.noise_multiplier * math.sqrt(self.num_directions), SENSITIVITY)
        return DiscreteGaussian(scale=scale + 2)  # Two steps for the roundings of float64, below 2**53.


@dataclass(frozen=True, kw_only=True)
class LaplaceSum(NoisySum):
    """The sum of rows clipped in L1 norm, with Laplace noise, for pure epsilon (Tang et al. 2025).

    Args:
        clip_norm: C, the largest L1 norm of one example's row of K coefficients.
        noise_multiplier: the noise's scale, in clip norms, for each coefficient.
        expected_batch_size: the public constant that the sum is divided by.

    Guarantee: `query(sampling_rate)`, for neighbours that differ in one row, whatever the rows are.
    """

    def query(self, sampling_rate: float) -> LaplaceQuery:
        """What one release costs, accounted as continuous noise for a sensitivity of two more lattice steps.

        That dominates the discrete noise that is drawn, for every epsilon. Let s be the scale, D the sensitivity and
        a = exp(-1 / s). The discrete loss is (D - 2j) / s or more with probability 1 - a**(j + 1) / (1 + a), for
        j <= D / 2; the continuous one, for D + 2, with probability 1 - a**(j + 1) / 2, which is no less. So for epsilon
        of 0 or more, delta is no less, and for epsilon below 0 it follows by reflection. Sampling and composition keep
        the order (Zhu, Dong and Wang 2022).
        """
        return LaplaceQuery(noise_multiplier=self._noise.scale / (SENSITIVITY + 2), sampling_rate=sampling_rate)

    def _clip(self, coefficients: torch.Tensor) -> np.ndarray:
        return clip_to_lattice(coefficients, self.clip_norm, order=1)

    @cached_property
    def _noise(self) -> DiscreteLaplace:
        return DiscreteLaplace(scale=lattice_scale(self.noise_multiplier, SENSITIVITY + 2))


@dataclass(frozen=True, kw_only=True)
class PlainMean(Mechanism):
    """The mean over the examples that are there, unclipped and without noise. NO PRIVACY; for baselines.

    On a lattice of step 2**-40; zero for an empty batch. Several processes may round the last digits in another way.
    """

    def _sum_rows(self, coefficients: torch.Tensor) -> np.ndarray:
        """The sum of the rows, and how many there are, float64 `[K + 1]`."""
        rows = np.nan_to_num(as_rows(coefficients), nan=0.0, posinf=0.0, neginf=0.0)
        return np.append(rows.sum(axis=0), float(len(rows)))

    def _release_sum(self, total: np.ndarray) -> list[int]:
        mean = total[:-1] / max(total[-1], 1.0)
        return [int(value) for value in np.clip(mean * SENSITIVITY, -MAX_INTEGER, MAX_INTEGER).tolist()]

    @property
    def unit(self) -> float:
        """A step is 2**-40."""
        return 1 / SENSITIVITY

    def query(self, sampling_rate: float) -> NonPrivateQuery:
        """What one release costs: everything, at any sampling rate."""
        return NonPrivateQuery()


NOISES: dict[str, type[GaussianSum] | type[LaplaceSum]] = {"gaussian": GaussianSum, "laplace": LaplaceSum}
