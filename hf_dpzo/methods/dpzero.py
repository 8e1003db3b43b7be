"""DPZero: one direction, one clipped scalar for each example, one draw of noise."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hf_dpzo.methods.method import Paper, PrivateMethod
from hf_dpzo.privacy.mechanism import GaussianSum


@dataclass(frozen=True, kw_only=True)
class DPZero(PrivateMethod):
    """Algorithm 2 of Zhang et al. 2024, on Poisson batches.

    The published code differs in three ways. It shuffles its batches, but accounts for Poisson sampling. It draws its
    noise from the generator that it has just seeded with the public direction. And it adds twice the noise that adding
    or removing one example requires; `paper_noise` does so too.

    Args:
        smoothing: mu; the authors' lambda.
        difference: `central`, or `forward`, which costs 2 forward passes as well.
        clip_norm: C, the largest absolute value of one example's coefficient.
        noise_multiplier: the noise's standard deviation, in clip norms.
        paper_noise: whether to add twice that noise, as in the paper, which counts the replacement of an example. The
            run then states the epsilon that it reaches, which is below `target_epsilon`.
        expected_batch_size: the public constant that the sum is divided by.
    """

    paper: ClassVar[Paper] = Paper(
        title="DPZero: Private Fine-Tuning of Language Models without Backpropagation",
        authors="Zhang, Li, Thekumparampil, Oh and He",
        venue="ICML 2024",
        url="https://arxiv.org/abs/2310.09639",
    )

    paper_noise: bool = False

    @cached_property
    def mechanism(self) -> GaussianSum:
        """The Gaussian mechanism on the sum of clipped scalars."""
        return GaussianSum(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier * (2 if self.paper_noise else 1),
            expected_batch_size=self.expected_batch_size,
        )

    @property
    def covers_replace_one(self) -> bool:
        """Whether `paper_noise` is set."""
        return self.paper_noise
