"""DPZero: one direction, one clipped scalar for each example, one noise."""

from dataclasses import dataclass
from typing import ClassVar

from hf_dpzo.estimator import CentralDifference
from hf_dpzo.mechanism import GaussianSum
from hf_dpzo.methods.method import Paper


@dataclass(frozen=True, kw_only=True)
class DPZero:
    """Algorithm 2 of Zhang et al. 2024, on Poisson batches.

    The authors fine-tune all of RoBERTa-large with smoothing 1e-3, learning rate 1e-6, batches of 64, 10,000 steps
    and clip norms of 50 to 400. Their published code shuffles its batches while accounting for Poisson sampling,
    draws its noise from the generator that it has just seeded with the public direction, and adds twice the noise
    that adding or removing one example asks for; this does none of the three.

    Args:
        smoothing: mu; the authors' lambda.
        clip_norm: C, the largest absolute value of one example's coefficient.
        noise_multiplier: the noise's standard deviation, in clip norms.
        expected_batch_size: the public constant that the sum is divided by.
    """

    paper: ClassVar[Paper] = Paper(
        title="DPZero: Private Fine-Tuning of Language Models without Backpropagation",
        authors="Zhang, Li, Thekumparampil, Oh and He",
        venue="ICML 2024",
        url="https://arxiv.org/abs/2310.09639",
    )

    noise_multiplier: float
    expected_batch_size: int
    smoothing: float = 1e-3
    clip_norm: float = 1.0

    @property
    def estimator(self) -> CentralDifference:
        """Central differences along a single direction."""
        return CentralDifference(smoothing=self.smoothing, num_directions=1)

    @property
    def mechanism(self) -> GaussianSum:
        """The noisy sum of clipped scalars."""
        return GaussianSum(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
        )
