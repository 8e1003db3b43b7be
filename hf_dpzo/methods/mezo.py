"""MeZO: memory-efficient zeroth-order SGD. No privacy; the baseline of the private methods."""

from dataclasses import dataclass
from typing import ClassVar

from hf_dpzo.estimator import CentralDifference
from hf_dpzo.mechanism import PlainMean
from hf_dpzo.methods.method import Paper


@dataclass(frozen=True, kw_only=True)
class MeZO:
    """Algorithm 1 of Malladi et al. 2023, with the n-SPSA estimate of definition 1.

    The authors use one direction, smoothing 1e-3 (1e-2 for LoRA on OPT), and learning rates of 1e-7 to 1e-6 for all
    parameters and 1e-5 to 1e-4 for LoRA. Two things differ here: batches are Poisson samples, as in the private
    methods, so that runs can be compared; and perturbations are in place and chunked, where the published code makes
    three copies.

    Args:
        smoothing: mu; the authors' epsilon.
        num_directions: K; the authors' n.
    """

    paper: ClassVar[Paper] = Paper(
        title="Fine-Tuning Language Models with Just Forward Passes",
        authors="Malladi, Gao, Nichani, Damian, Lee, Chen and Arora",
        venue="NeurIPS 2023",
        url="https://arxiv.org/abs/2305.17333",
    )

    smoothing: float = 1e-3
    num_directions: int = 1

    @property
    def estimator(self) -> CentralDifference:
        """Central differences along `num_directions` directions."""
        return CentralDifference(smoothing=self.smoothing, num_directions=self.num_directions)

    @property
    def mechanism(self) -> PlainMean:
        """The mean of the batch, as it is."""
        return PlainMean()
