"""MeZO: memory-efficient zeroth-order SGD, the baseline of the private methods. It has no privacy."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hf_dpzo.methods.method import Method, Paper
from hf_dpzo.privacy.mechanism import PlainMean


@dataclass(frozen=True, kw_only=True)
class MeZO(Method):
    """Algorithm 1 of Malladi et al. 2023, with the n-SPSA estimate of definition 1.

    Two things differ from the published code. Batches are Poisson samples, as in the private methods, so that runs can
    be compared. Perturbations are made in place and in chunks, while the published code copies each tensor that moves.

    Args:
        smoothing: mu; the authors' epsilon.
        num_directions: K, the number of directions; the authors' n.
        difference: `central`, or `forward`, which costs K + 1 forward passes instead of 2K.
    """

    paper: ClassVar[Paper] = Paper(
        title="Fine-Tuning Language Models with Just Forward Passes",
        authors="Malladi, Gao, Nichani, Damian, Lee, Chen and Arora",
        venue="NeurIPS 2023",
        url="https://arxiv.org/abs/2305.17333",
    )

    num_directions: int = 1

    @cached_property
    def mechanism(self) -> PlainMean:
        """The mean over the batch, neither clipped nor noised."""
        return PlainMean()
