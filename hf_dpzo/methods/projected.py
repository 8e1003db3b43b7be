"""Projected zeroth-order gradient descent, with the noise that makes it private."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hf_dpzo.methods.method import Paper, PrivateMethod
from hf_dpzo.privacy.mechanism import ClippedSum, GaussianSum
from hf_dpzo.zo.constraints import Ball, Constraint


@dataclass(frozen=True, kw_only=True)
class Projected(PrivateMethod):
    """Projected zeroth-order gradient descent, which Gupta et al. 2025 show to have no inherent privacy.

    Each step ends with a projection onto a ball around the initial weights. The paper gives objectives for which the
    random directions hide nothing. `hf-dpzo audit --demo inherent-privacy` shows one for which a single step tells
    neighbouring data sets apart, even to an attacker who does not know its direction. So noise is added as in DP-AggZO.
    With `noise_multiplier=0` the run and its card are marked NOT PRIVATE.

    Args:
        smoothing: mu, the distance from theta to a probe point, in units of a direction.
        num_directions: K, the number of directions.
        difference: `central`, or `forward`, which costs K + 1 forward passes instead of 2K.
        radius: the ball's L2 radius, over all trained parameters as one vector.
        clip_norm: C, the largest L2 norm of one example's K coefficients.
        noise_multiplier: the noise's standard deviation on each coefficient, in clip norms; 0 for none.
        expected_batch_size: the public constant that the sum is divided by.
    """

    paper: ClassVar[Paper] = Paper(
        title="On the Inherent Privacy of Zeroth-Order Projected Gradient Descent",
        authors="Gupta, Razaviyayn and Sharan",
        venue="AISTATS 2025",
        url="https://arxiv.org/abs/2507.05610",
    )
    allows_no_noise: ClassVar[bool] = True

    radius: float
    num_directions: int = 1

    @cached_property
    def mechanism(self) -> GaussianSum | ClippedSum:
        """The Gaussian mechanism on the sum of jointly clipped rows; without noise, the sum itself."""
        if self.noise_multiplier == 0:
            return ClippedSum(clip_norm=self.clip_norm, expected_batch_size=self.expected_batch_size)
        return super().mechanism

    @property
    def constraint(self) -> Constraint:
        """The projection onto the ball around the initial weights."""
        return Ball(radius=self.radius)
