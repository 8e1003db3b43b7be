"""DP-ZO: clip the difference of two losses, add Gaussian noise, or Laplace noise for pure epsilon."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hf_dpzo.methods.method import Paper, PrivateMethod
from hf_dpzo.privacy.mechanism import NOISES, GaussianSum, LaplaceSum


@dataclass(frozen=True, kw_only=True)
class DPZO(PrivateMethod):
    """DP-ZO of Tang et al. 2025: DPZero's step, with the clip norm on the difference of losses itself.

    Dividing by the distance of the probe points after clipping to C is clipping to C over that distance, so that is
    what is done. At smoothing 1e-3 the default of 0.05 is a clip norm of 25 on DPZero's coefficients.

    Args:
        smoothing: mu; the authors' phi.
        difference: `central`, or `forward`, which costs 2 forward passes as well.
        clip_norm: C, the largest absolute difference of one example's two losses, in units of the loss.
        noise: `gaussian`, or `laplace`, which gives epsilon with delta 0 as well.
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
        """What the clip norm bounds."""
        return "difference of losses"

    @cached_property
    def mechanism(self) -> GaussianSum | LaplaceSum:
        """The noisy sum of clipped differences, over the distance of the probe points."""
        return NOISES[self.noise](
            clip_norm=self.clip_norm / self.estimator.span,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
        )
