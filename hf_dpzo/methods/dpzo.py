"""DP-ZO: the clipped difference of two losses, with Gaussian noise, or with Laplace noise for pure epsilon."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hf_dpzo.methods.method import Paper, PrivateMethod
from hf_dpzo.privacy.mechanism import NOISES, GaussianSum, LaplaceSum


@dataclass(frozen=True, kw_only=True)
class DPZO(PrivateMethod):
    """DP-ZO of Tang et al. 2025: DPZero's step, but with the difference of losses itself clipped.

    To clip the difference to C and then divide by the distance between the probe points is the same as to clip the
    quotient to C over that distance, which is what this code does. At smoothing 1e-3 the default clip norm of 0.05
    equals a clip norm of 25 on DPZero's coefficients.

    Args:
        smoothing: mu; the authors' phi.
        difference: `central`, or `forward`, which costs 2 forward passes as well.
        clip_norm: C, the largest absolute difference of one example's two losses, in units of the loss.
        noise: `gaussian`, or `laplace`, which also gives an epsilon at delta 0.
        noise_multiplier: the noise's scale, in clip norms: a standard deviation, or Laplace's b.
        expected_batch_size: the public constant that the sum is divided by.
    """

    paper: ClassVar[Paper] = Paper(
        title="Private Fine-tuning of Large Language Models with Zeroth-order Optimization",
        authors="Tang, Panda, Nasr, Mahloujifar and Mittal",
        venue="TMLR 2025",
        url="https://arxiv.org/abs/2401.04343",
    )

    clip_norm: float = 0.05
    noise: str = "gaussian"

    @property
    def clipped(self) -> str:
        """The quantity that the clip norm bounds, in words."""
        return "difference of losses"

    @cached_property
    def mechanism(self) -> GaussianSum | LaplaceSum:
        """The Gaussian or Laplace mechanism on the sum of clipped differences, over the probe points' distance."""
        return NOISES[self.noise](
            clip_norm=self.clip_norm / self.estimator.span,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
        )
