"""DP-AggZO: K directions, clipped jointly, at the privacy cost of one."""

import math
from dataclasses import dataclass
from typing import ClassVar

from hf_dpzo.methods.method import Paper, PrivateMethod


@dataclass(frozen=True, kw_only=True)
class AggZO(PrivateMethod):
    """Algorithm 1 of Bao et al. 2025, with the clipping of its equation 21.

    An example's K coefficients of n-SPSA, its K difference quotients divided by K, are clipped as one vector. Its
    sensitivity is the clip norm, whatever K is, so the noise on each coefficient does not depend on K either.
    `scaled_clip_norm` is the authors' rule for choosing the clip norm.

    The authors spend 5 % of epsilon on a noisy size of the data set to divide by. Here the sum is divided by the
    expected batch size, a public constant. Their published code adds no noise to an empty batch, and draws its noise
    from the generator that it has just seeded with the last direction. This code does neither.

    Args:
        smoothing: mu; the authors' phi.
        num_directions: K, the number of directions.
        difference: `central`, or `forward`, which costs K + 1 forward passes instead of 2K.
        clip_norm: C, the largest L2 norm of one example's K coefficients.
        noise_multiplier: the noise's standard deviation on each coefficient, in clip norms.
        expected_batch_size: the public constant that the sum is divided by.
    """

    paper: ClassVar[Paper] = Paper(
        title="Unlocking the Power of Differentially Private Zeroth-order Optimization for Fine-tuning LLMs",
        authors="Bao, Jiang, Wei, Xiao, Li, Li and Ding",
        venue="USENIX Security 2025",
        url="https://www.usenix.org/conference/usenixsecurity25/presentation/bao-ergute",
    )

    num_directions: int = 16


def scaled_clip_norm(beta: float, num_directions: int) -> float:
    """Return `beta / sqrt(K)`, the authors' rule for the clip norm of K directions.

    An update then has the same noise for every K. Clipping loses less as K grows, because the norm of K coefficients
    concentrates around `1 / sqrt(K)` of one quotient's root mean square.

    Args:
        beta: the clip norm for one direction.
        num_directions: K, the number of directions.

    Raises:
        ValueError: beta is not positive and finite, or K is below one.

    >>> scaled_clip_norm(40.0, 64)
    5.0
    """
    if not (math.isfinite(beta) and beta > 0 and num_directions >= 1):
        raise ValueError(f"beta={beta}, num_directions={num_directions}: both must be positive.")
    return beta / math.sqrt(num_directions)
