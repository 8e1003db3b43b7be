"""The one door: sensitive rows go in, released integers come out.

Each example's row is clipped onto the lattice, the rows are summed, and one draw of discrete noise is added: always,
even to the sum of an empty batch.
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


# The log has 64 bits for each released integer.
MAX_INTEGER = 2.0**62


@dataclass(frozen=True, kw_only=True)
class Release:
    """What leaves a step. Everything computed from it is post-processing.

    Args:
        integers: the released integer of each direction, in lattice steps.
        unit: the value of one lattice step, after division by the expected batch size.
    """

    integers: tuple[int, ...]
    unit: float

    @property
    def coefficients(self) -> list[float]:
        """The estimated mean coefficient of each direction."""
        return [integer * self.unit for integer in self.integers]


class Mechanism(ABC):
    """The one door: sums the sensitive rows of a batch, and releases the sum."""

    def release(
        self,
        coefficients: torch.Tensor,
        processes: Processes = SINGLE_PROCESS,
        on_release: Callable[[tuple[int, ...]], object] = lambda integers: None,
    ) -> Release:
        """Release the sum of `coefficients` over all processes. All of them get the same release.

        Args:
            coefficients: one row for each example in this process' share of the batch, float `[batch, K]`. SENSITIVE.
            processes: the run's processes.
            on_release: a function that is called with the released integers. The first process calls it before it
                broadcasts them.

        >>> mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
        >>> len(mechanism.release(torch.zeros(0, 3)).integers)
        3
        """
        total = processes.reduce_sum(self._sum_rows(coefficients))
        # Only the first process has the total. The others broadcast zeros, which are ignored, and receive its release.
        integers = [0] * coefficients.shape[1] if total is None else self._release_sum(total)
        if total is not None:
            on_release(tuple(integers))
        released = tuple(processes.broadcast(np.array(integers, dtype=np.int64)).tolist())
        if total is None:
            on_release(released)
        return Release(integers=released, unit=self.unit)

    @abstractmethod
    def _sum_rows(self, coefficients: torch.Tensor) -> np.ndarray:
        """Return what this process adds to the sum over all processes. SENSITIVE."""

    @abstractmethod
    def _release_sum(self, total: np.ndarray) -> list[int]:
        """Return the integers to release, one for each direction, given the sum over all processes."""

    @property
    @abstractmethod
    def unit(self) -> float:
        """The value of one lattice step in a release."""

    @abstractmethod
    def query(self, sampling_rate: float) -> Query:
        """Return the cost of one release when each row joins the batch with probability `sampling_rate`."""


@dataclass(frozen=True, kw_only=True)
class IntegerSum(Mechanism):
    """Releases the sum of clipped rows, in integers.

    Args:
        clip_norm: C, the largest norm of one example's row of K coefficients.
        expected_batch_size: the public constant that the sum is divided by.
    """

    clip_norm: float
    expected_batch_size: int

    @property
    def unit(self) -> float:
        """The value of one lattice step: a clip norm over `SENSITIVITY` and over the expected batch size."""
        return self.clip_norm / SENSITIVITY / self.expected_batch_size

    def clip_public(self, coefficients: torch.Tensor) -> np.ndarray:
        """Return what each of several public rows would add to a sum, in clip norms, float64 `[batch, K]`."""
        return self._clip(coefficients) / SENSITIVITY

    def _clip(self, coefficients: torch.Tensor) -> np.ndarray:
        """Return each row on the lattice, int64 `[batch, K]`. SENSITIVE."""
        return clip_to_lattice(coefficients, self.clip_norm)

    def _sum_rows(self, coefficients: torch.Tensor) -> np.ndarray:
        """Return the exact sums of the clipped rows, int64 `[K]`. SENSITIVE."""
        return self._clip(coefficients).sum(axis=0, dtype=np.int64)

    def _release_sum(self, total: np.ndarray) -> list[int]:
        return self._add_noise(total.tolist())

    @abstractmethod
    def _add_noise(self, sums: list[int]) -> list[int]:
        """Return the integers to release, given the exact sums over all processes."""


@dataclass(frozen=True, kw_only=True)
class NoisySum(IntegerSum):
    """Releases the sum of clipped rows with noise.

    Args:
        clip_norm: C, the largest norm of one example's row of K coefficients.
        expected_batch_size: the public constant that the sum is divided by.
        noise_multiplier: the noise's scale over the sensitivity.
    """

    noise_multiplier: float

    @property
    def noise_scale(self) -> float:
        """The scale of the noise that is drawn, in lattice steps: its standard deviation, or Laplace's b."""
        return float(self._noise.scale)

    def _add_noise(self, sums: list[int]) -> list[int]:
        return self._noise.add(sums)

    @property
    @abstractmethod
    def _noise(self) -> DiscreteNoise:
        """The sampler of the noise."""


@dataclass(frozen=True, kw_only=True)
class ClippedSum(IntegerSum):
    """Releases the exact sum of jointly clipped rows. NO PRIVACY: for runs that want clipping without noise."""

    def query(self, sampling_rate: float) -> NonPrivateQuery:
        """Return the cost of one release, which no epsilon bounds at any sampling rate."""
        return NonPrivateQuery()

    def _add_noise(self, sums: list[int]) -> list[int]:
        return sums


@dataclass(frozen=True, kw_only=True)
class GaussianSum(NoisySum):
    """Releases the sum of jointly clipped rows with Gaussian noise.

    Sources: Bao et al. 2025, eq. 21; Zhang et al. 2024, alg. 2.

    Args:
        clip_norm: C, the largest L2 norm of one example's row of K coefficients.
        noise_multiplier: the noise's standard deviation, in clip norms, for each coefficient. It does not depend on K.
        expected_batch_size: the public constant that the sum is divided by.

    Guarantee: one release costs `query(sampling_rate)`, for neighbours that differ by one row, whatever the rows hold.
    """

    def query(self, sampling_rate: float) -> GaussianQuery:
        """Return the cost of one release with the noise that is drawn: `noise_multiplier` rounded up to the lattice."""
        return GaussianQuery(noise_multiplier=self._noise.scale / SENSITIVITY, sampling_rate=sampling_rate)

    @cached_property
    def _noise(self) -> DiscreteGaussian:
        return DiscreteGaussian(scale=lattice_scale(self.noise_multiplier, SENSITIVITY))


@dataclass(frozen=True, kw_only=True)
class SeparateGaussianSum(NoisySum):
    """Releases the sum of rows, each coefficient clipped by itself, with Gaussian noise (Liu et al. 2025).

    K coefficients of up to C each make a row of norm up to `sqrt(K) * C`, which is the sensitivity. So K directions
    need `sqrt(K)` times the noise on each coefficient.

    Args:
        clip_norm: C, the largest absolute value of one example's coefficient.
        noise_multiplier: the noise's standard deviation, in units of `sqrt(K) * clip_norm`.
        num_directions: K, the number of coefficients of a row.
        expected_batch_size: the public constant that the sum is divided by.

    Guarantee: one release costs `query(sampling_rate)`, for neighbours that differ by one row, whatever the rows hold.

    >>> mechanism = SeparateGaussianSum(clip_norm=1.0, noise_multiplier=2.0, num_directions=4, expected_batch_size=8)
    >>> mechanism.query(0.5).noise_multiplier
    2.0
    """

    num_directions: int

    def query(self, sampling_rate: float) -> GaussianQuery:
        """Return the cost of one release of all K coefficients. The noise that is drawn is no less than is stated."""
        drawn = self._noise.scale / SENSITIVITY / math.sqrt(self.num_directions)
        return GaussianQuery(noise_multiplier=min(self.noise_multiplier, drawn), sampling_rate=sampling_rate)

    def _clip(self, coefficients: torch.Tensor) -> np.ndarray:
        if coefficients.shape[1] != self.num_directions:
            raise ValueError(f"num_directions={self.num_directions}: a row has {coefficients.shape[1]} coefficients.")
        columns = [clip_to_lattice(column, self.clip_norm) for column in coefficients.split(1, dim=1)]
        return np.concatenate(columns, axis=1)

    @cached_property
    def _noise(self) -> DiscreteGaussian:
        scale = lattice_scale(self.noise_multiplier * math.sqrt(self.num_directions), SENSITIVITY)
        # The root and the product are rounded, each by at most one step, because the scale stays below 2**53.
        return DiscreteGaussian(scale=scale + 2)


@dataclass(frozen=True, kw_only=True)
class LaplaceSum(NoisySum):
    """Releases the sum of rows clipped in L1 norm with Laplace noise, for a pure epsilon (Tang et al. 2025).

    Args:
        clip_norm: C, the largest L1 norm of one example's row of K coefficients.
        noise_multiplier: the noise's scale, in clip norms, for each coefficient.
        expected_batch_size: the public constant that the sum is divided by.

    Guarantee: one release costs `query(sampling_rate)`, for neighbours that differ by one row, whatever the rows hold.
    """

    def query(self, sampling_rate: float) -> LaplaceQuery:
        """Return the cost of one release, accounted as continuous noise for a sensitivity of two more lattice steps.

        The continuous noise dominates the discrete noise that is drawn, at every epsilon. Let s be the scale, D the
        sensitivity in lattice steps, a = exp(-1 / s), and j an integer from 0 to D / 2. The discrete privacy loss is
        (D - 2j) / s or more with probability 1 - a**(j + 1) / (1 + a). The continuous loss, for D + 2, is that much or
        more with probability 1 - a**(j + 1) / 2, which is no smaller, because a < 1. So the continuous delta is no
        smaller at every epsilon of 0 or more, and by reflection at every epsilon below 0. Sampling and composition
        preserve the order (Zhu, Dong and Wang 2022).
        """
        return LaplaceQuery(noise_multiplier=self._noise.scale / (SENSITIVITY + 2), sampling_rate=sampling_rate)

    def _clip(self, coefficients: torch.Tensor) -> np.ndarray:
        return clip_to_lattice(coefficients, self.clip_norm, order=1)

    @cached_property
    def _noise(self) -> DiscreteLaplace:
        return DiscreteLaplace(scale=lattice_scale(self.noise_multiplier, SENSITIVITY + 2))


@dataclass(frozen=True, kw_only=True)
class PlainMean(Mechanism):
    """Releases the mean over the examples of a batch, unclipped and without noise. NO PRIVACY: for baselines.

    The mean lies on a lattice of step 2**-40, and is zero for an empty batch. Its last digits may depend on the number
    of processes.
    """

    def _sum_rows(self, coefficients: torch.Tensor) -> np.ndarray:
        """Return the sum of the rows, followed by their number, float64 `[K + 1]`. SENSITIVE."""
        rows = np.nan_to_num(as_rows(coefficients), nan=0.0, posinf=0.0, neginf=0.0)
        return np.append(rows.sum(axis=0), float(len(rows)))

    def _release_sum(self, total: np.ndarray) -> list[int]:
        mean = total[:-1] / max(total[-1], 1.0)
        return [int(value) for value in np.clip(mean * SENSITIVITY, -MAX_INTEGER, MAX_INTEGER).tolist()]

    @property
    def unit(self) -> float:
        """The value of one lattice step, 2**-40."""
        return 1 / SENSITIVITY

    def query(self, sampling_rate: float) -> NonPrivateQuery:
        """Return the cost of one release, which no epsilon bounds at any sampling rate."""
        return NonPrivateQuery()


NOISES: dict[str, type[GaussianSum] | type[LaplaceSum]] = {"gaussian": GaussianSum, "laplace": LaplaceSum}
