"""What limits a run: the noise of sampling, the noise of privacy, or the clip norm. Computed from public numbers alone.

A step estimates the mean coefficient of all rows from a batch of some, and adds noise. Both errors are told in clip
norms. Where batches hold few rows, the first is many times the second, and no epsilon helps.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch

from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.privacy.mechanism import LaplaceSum, NoisySum, SeparateGaussianSum


# The ratio of the noises from which on rows or directions limit a run, and not epsilon.
LARGE_RATIO = 3.0


# A run that has seen fewer coefficients of rows than this has seen too few to learn much.
FEW_COEFFICIENTS = 10_000


# A clip norm of as many spreads adds noise for nothing, and one of as few leaves little but signs.
WIDE_CLIP, NARROW_CLIP = 4.0, 0.05


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """The errors of one released coefficient, and how its clip norm fits, by public rows.

    Args:
        sampling: the standard deviation that the choice of the batch gives a coefficient, in clip norms.
        privacy: the standard deviation of the noise on it, in clip norms.
        clipped: the share of the public rows that would be clipped.
        spread: the root mean square of what a clip norm bounds, in clip norms.
        coefficients: the number of coefficients of rows that the whole run sees, on average.
    """

    sampling: float
    privacy: float
    clipped: float
    spread: float
    coefficients: float

    @classmethod
    def of_public(
        cls, quotients: torch.Tensor, mechanism: NoisySum, *, num_directions: int, sampling_rate: float, steps: int
    ) -> Self:
        """Return the limits of a run whose rows are like public ones.

        Args:
            quotients: the difference quotients of public rows along some directions, float64 `[rows, directions]`.
            mechanism: what releases the coefficients.
            num_directions: K, the directions of a step.
            sampling_rate: the probability with which a row takes part in a step.
            steps: the number of steps.

        >>> from hf_dpzo.privacy.mechanism import GaussianSum
        >>> mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=0.5, expected_batch_size=16)
        >>> quotients = torch.tensor([[0.5, -0.5], [2.0, -2.0]], dtype=torch.float64)
        >>> limits = RunLimits.of_public(quotients, mechanism, num_directions=1, sampling_rate=0.01, steps=100)
        >>> round(limits.sampling, 3), limits.privacy, limits.clipped, limits.coefficients
        (0.197, 0.03125, 0.5, 1600)
        """
        rows = _imitate_rows(quotients, num_directions)
        sizes = rows.abs() if isinstance(mechanism, SeparateGaussianSum) else rows.norm(dim=1, keepdim=True)
        sizes = sizes / mechanism.clip_norm
        added = torch.from_numpy(mechanism.clip_public(rows))
        size = mechanism.expected_batch_size
        laplace = math.sqrt(2) if isinstance(mechanism, LaplaceSum) else 1.0
        return cls(
            sampling=_root_mean_square(added) * math.sqrt((1 - sampling_rate) / size),
            privacy=laplace * mechanism.noise_scale / SENSITIVITY / size,
            clipped=float((sizes > 1).any(dim=1).double().mean()),
            spread=_root_mean_square(sizes),
            coefficients=steps * size * num_directions,
        )

    @property
    def ratio(self) -> float:
        """The noise of sampling over the noise of privacy."""
        return self.sampling / self.privacy

    @property
    def rows_limit(self) -> bool:
        """Whether rows or directions limit the run, and not epsilon."""
        return self.ratio >= LARGE_RATIO

    @property
    def clip_fits(self) -> bool:
        """Whether the clip norm is of the size of what it bounds. Where nothing moves, no clip norm fits better."""
        return self.spread == 0 or NARROW_CLIP <= 1 / self.spread <= WIDE_CLIP

    @property
    def needs_attention(self) -> bool:
        """Whether a user should hear of it: the run sees few coefficients by its own choice, or clips badly."""
        return (self.rows_limit and self.coefficients < FEW_COEFFICIENTS) or not self.clip_fits


def _imitate_rows(quotients: torch.Tensor, num_directions: int) -> torch.Tensor:
    """Return rows of as many coefficients as a step has, from quotients along fewer or more directions."""
    count = quotients.shape[1]
    if num_directions < count:
        whole = count // num_directions * num_directions
        return quotients[:, :whole].reshape(-1, num_directions) / num_directions
    return quotients.repeat(1, -(-num_directions // count))[:, :num_directions] / num_directions


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def list_equal_times(*, batch_size: int, num_directions: int, steps: int, num_units: int) -> list[tuple[int, int, int]]:
    """Return batch sizes, numbers of directions and of steps that take as many passes as a plan, with fewer steps.

    >>> list_equal_times(batch_size=8, num_directions=1, steps=150, num_units=5000)
    [(32, 1, 38), (8, 4, 38)]
    """
    fewer = round(steps / 4)
    options = [(min(4 * batch_size, num_units), num_directions, fewer), (batch_size, 4 * num_directions, fewer)]
    return [option for option in options if fewer >= 20 and option[0] * option[1] == 4 * batch_size * num_directions]
