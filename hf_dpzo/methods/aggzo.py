"""DP-AggZO: K directions, clipped jointly, for the privacy of one."""

from dataclasses import dataclass
from typing import ClassVar

from hf_dpzo.estimator import CentralDifference
from hf_dpzo.mechanism import GaussianSum
from hf_dpzo.methods.method import Paper


@dataclass(frozen=True, kw_only=True)
class AggZO:
    """Algorithm 1 of Bao et al. 2025, with the clipping of its equation 21.

    The vector that is clipped is an example's K coefficients of n-SPSA, that is, its K difference quotients divided
    by K. Its sensitivity is the clip norm whatever K is, and so is the noise on each coefficient. The authors' rule
    for choosing it is beta / sqrt(K). They fine-tune RoBERTa-large for 1,000 steps with K = 64, smoothing 1e-3, clip
    norm 5 and learning rate 8e-5 on MNLI at epsilon 2. They spend 5 % of epsilon on a noisy data set size to divide
    by; the division here is by the expected batch size, a public constant. Their published code skips empty batches
    without adding noise, and draws its noise from the generator that it has just seeded with the last direction; this
    does neither.

    Args:
        smoothing: mu; the authors' phi.
        num_directions: K.
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

    noise_multiplier: float
    expected_batch_size: int
    smoothing: float = 1e-3
    num_directions: int = 16
    clip_norm: float = 1.0

    @property
    def estimator(self) -> CentralDifference:
        """Central differences along `num_directions` directions."""
        return CentralDifference(smoothing=self.smoothing, num_directions=self.num_directions)

    @property
    def mechanism(self) -> GaussianSum:
        """The noisy sum of jointly clipped vectors."""
        return GaussianSum(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
        )
