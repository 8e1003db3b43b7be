"""The one door: sensitive rows go in, released integers come out.

Each example's row is clipped to an L2 norm of `clip_norm`, put on the lattice of step `clip_norm * 2**-40` by
truncation towards zero, and summed in int64. So the sum does not depend on the order of the rows or on how they were
grouped, and one row moves it by at most 2**40 lattice steps: exactly, not up to rounding. One draw of discrete noise
is added, always, even to the sum of no rows.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hf_dpzo.accounting import GaussianQuery, NonPrivateQuery
from hf_dpzo.noise import DiscreteGaussian


LATTICE_BITS = 40
SENSITIVITY = 1 << LATTICE_BITS
# More rows than this could overflow the int64 sum.
MAX_ROWS = 1 << 22


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


@dataclass(frozen=True, kw_only=True)
class GaussianSum:
    """The sum of jointly clipped rows with Gaussian noise (Bao et al. 2025, eq. 21; Zhang et al. 2024, alg. 2).

    Args:
        clip_norm: C, the largest L2 norm of one example's row of K coefficients.
        noise_multiplier: the noise's standard deviation, in clip norms, for each coefficient. Does not depend on K.
        expected_batch_size: the public constant that the sum is divided by.

    Guarantee: `query(sampling_rate)`, for neighbours that differ in one row, whatever the rows are.
    """

    clip_norm: float
    noise_multiplier: float
    expected_batch_size: int

    def release(self, differences: torch.Tensor) -> Release:
        """Release the noisy sum of `differences`, `[batch, K]`.

        >>> mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
        >>> len(mechanism.release(torch.zeros(0, 3)).integers)
        3
        """
        sums = clip_to_lattice(differences, self.clip_norm).sum(axis=0, dtype=np.int64)
        noisy = self._noise.add(sums.tolist())
        return Release(integers=tuple(noisy), unit=self.clip_norm / SENSITIVITY / self.expected_batch_size)

    def query(self, sampling_rate: float) -> GaussianQuery:
        """What one release costs. The noise is the one that is drawn: `noise_multiplier` rounded up to the lattice."""
        return GaussianQuery(noise_multiplier=self._noise.scale / SENSITIVITY, sampling_rate=sampling_rate)

    @cached_property
    def _noise(self) -> DiscreteGaussian:
        return DiscreteGaussian(scale=math.ceil(self.noise_multiplier * SENSITIVITY))


@dataclass(frozen=True, kw_only=True)
class PlainMean:
    """The mean over the examples that are there, unclipped and without noise. NO PRIVACY; for baselines."""

    def release(self, differences: torch.Tensor) -> Release:
        """Release the mean of `differences`, `[batch, K]`, on a lattice of step 2**-40; zero for an empty batch."""
        rows = np.nan_to_num(_as_array(differences), nan=0.0, posinf=0.0, neginf=0.0)
        mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])
        return Release(integers=tuple(int(value * SENSITIVITY) for value in mean.tolist()), unit=1 / SENSITIVITY)

    def query(self, sampling_rate: float) -> NonPrivateQuery:
        """What one release costs: everything, at any sampling rate."""
        return NonPrivateQuery()


Mechanism = GaussianSum | PlainMean


def clip_to_lattice(differences: torch.Tensor, clip_norm: float) -> np.ndarray:
    """Clip each row to `clip_norm` and truncate it to integers, int64 `[batch, K]` with L2 norm at most 2**40.

    Non-finite values count as zero.

    >>> clip_to_lattice(torch.tensor([[3.0, 4.0], [float("nan"), 0.5]]), clip_norm=1.0) * 2.0**-40
    array([[0.6, 0.8],
           [0. , 0.5]])
    """
    rows = _as_array(differences)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"a logical batch holds more than {MAX_ROWS} rows: lower expected_batch_size.")
    rows = np.where(np.isfinite(rows), rows, 0.0)
    # Dividing by the largest entry first keeps the squares of huge and of tiny rows from leaving the range of float64.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    shape = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    norm_of_shape = np.sqrt(np.square(shape).sum(axis=1, keepdims=True))
    # One lattice step short of the clip norm, so that no rounding of float64 (some 2**-50) can carry a row beyond it.
    with np.errstate(over="ignore"):
        allowed = np.minimum(largest / clip_norm, (1 - 2.0**-LATTICE_BITS) / np.maximum(norm_of_shape, 1.0))
    return np.trunc(shape * (allowed * SENSITIVITY)).astype(np.int64)


def _as_array(differences: torch.Tensor) -> np.ndarray:
    if differences.ndim != 2:
        raise ValueError(f"ndim={differences.ndim}: the mechanism takes one row for each example, [batch, directions].")
    return differences.detach().cpu().double().numpy()
