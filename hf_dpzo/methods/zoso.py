"""DP-ZOSO: stages that double in length, halve the learning rate, and pull the weights to where the stage began."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hf_dpzo.methods.method import Paper, PrivateMethod, Stage
from hf_dpzo.privacy.mechanism import SeparateGaussianSum
from hf_dpzo.zo.constraints import Constraint, QuadraticAnchor


@dataclass(frozen=True, kw_only=True)
class ZOSO(PrivateMethod):
    """The stage-wise method of Liu et al. 2025.

    Stage s of S takes `2**s / (2**S - 1)` of the steps, at `2**-s` of the learning rate. Its smoothing is interpolated
    geometrically between `smoothing` and `final_smoothing`. Its quadratic regularizer is centred on the weights with
    which the stage began.

    The published code has three errors. The regularizer is always zero, because its centre aliases the weights. A
    smoothing that falls becomes NaN. And P directions are accounted as one. Here, as there, each of the P coefficients
    is clipped by itself, but the noise is `sqrt(P)` times theirs, which is what P releases cost.

    Args:
        smoothing: mu in the first stage; the authors' zo_eps_start.
        final_smoothing: mu in the last stage; by default the same as in the first.
        num_stages: S, the number of stages.
        anchor_strength: rho in the regularizer `rho / 2 * ||theta - theta_s||**2`; 0 for no regularizer.
        num_directions: P, the number of directions.
        difference: `central`, or `forward`, which costs P + 1 forward passes instead of 2P.
        clip_norm: C, the largest absolute value of one example's difference quotient along one direction.
        noise_multiplier: the noise's standard deviation on each quotient, in units of `sqrt(P)` clip norms.
        expected_batch_size: the public constant that the sum is divided by.
    """

    paper: ClassVar[Paper] = Paper(
        title="Differentially Private Zeroth-Order Methods for Scalable Large Language Model Fine-tuning",
        authors="Liu, Lou, Bao, Hu, Li, Qin and Ren",
        venue="NDSS 2025",
        url="https://arxiv.org/abs/2402.07818",
    )

    num_directions: int = 1
    final_smoothing: float | None = None
    num_stages: int = 3
    anchor_strength: float = 5e-4

    @cached_property
    def mechanism(self) -> SeparateGaussianSum:
        """The Gaussian mechanism on the sum of coefficients that are clipped one by one.

        A coefficient is a quotient divided by P, so its clip norm is divided by P too.
        """
        return SeparateGaussianSum(
            clip_norm=self.clip_norm / self.num_directions,
            noise_multiplier=self.noise_multiplier,
            num_directions=self.num_directions,
            expected_batch_size=self.expected_batch_size,
        )

    @property
    def clipped(self) -> str:
        """The quantity that the clip norm bounds, in words."""
        if self.num_directions == 1:
            return "difference quotient"
        return f"{self.num_directions} difference quotients, each by itself"

    @property
    def noise_unit(self) -> str:
        """The unit of the noise multiplier, in words: the sensitivity of P coefficients that are clipped one by one."""
        return "clip norms" if self.num_directions == 1 else f"sqrt({self.num_directions}) clip norms"

    @property
    def constraint(self) -> Constraint:
        """The pull towards where the stage began, which needs a copy of the weights; none at strength zero."""
        return QuadraticAnchor(strength=self.anchor_strength) if self.anchor_strength > 0 else Constraint()

    def stage(self, step: int, planned_steps: int) -> Stage:
        """Return the stage that `step` belongs to.

        >>> zoso = ZOSO(noise_multiplier=1.0, expected_batch_size=8)
        >>> [zoso.stage(step, 7000).rate_factor for step in (0, 999, 1000, 2999, 3000, 6999)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
        """
        shares = 2**self.num_stages - 1
        firsts = [planned_steps * (2**number - 1) // shares for number in range(self.num_stages)]
        number = max(number for number, first in enumerate(firsts) if first <= step)
        return Stage(
            number=number,
            smoothing=self._interpolate_smoothing(number),
            rate_factor=0.5**number,
        )

    def check_plan(self, planned_steps: int) -> None:
        """Raise `ValueError` if a stage would have no step, or if `final_smoothing` would have no effect."""
        if self.num_stages == 1 and self.final_smoothing is not None:
            raise ValueError(
                f"final_smoothing={self.final_smoothing:g}: num_stages=1 has no later stage; raise it, or remove this."
            )
        if self.num_stages >= (planned_steps + 1).bit_length():
            raise ValueError(
                f"num_stages={self.num_stages}: stages that double in length need 2**{self.num_stages} - 1 steps, and "
                f"there are {planned_steps}; lower it, or raise max_steps."
            )

    def _interpolate_smoothing(self, number: int) -> float:
        if self.final_smoothing is None or self.num_stages == 1:
            return self.smoothing
        return self.smoothing * (self.final_smoothing / self.smoothing) ** (number / (self.num_stages - 1))
