"""DP-ZOPO: DP-ZOSO on a few coordinates, chosen without data."""

from dataclasses import dataclass

from hf_dpzo.methods.zoso import ZOSO
from hf_dpzo.zo.pruning import DataFreePruning


MASK_SCHEDULES = ("static", "dynamic")


@dataclass(frozen=True, kw_only=True)
class ZOPO(ZOSO):
    """The stage-wise pruning method of Liu et al. 2025.

    A mask selects the coordinates that are perturbed and updated; it is made from the weights and public randomness
    (`pruning.py`), so it costs no privacy. In the published code masked perturbations and updates edit copies, so that
    nothing is trained at all. Of its two ways to weigh the selected coordinates, equally and by rank, this is equally.

    The published code has the static mask alone. `dynamic` is a reading of the paper's word for another: a new mask
    from the current weights at the beginning of each stage. What the paper's incremental strategy adds, and when, could
    not be made out, so it is not here.

    Args:
        smoothing: mu in the first stage; the authors' zo_eps_start.
        final_smoothing: mu in the last; by default that of the first.
        num_stages: S.
        anchor_strength: rho, of the regularizer `rho / 2 * ||theta - theta_s||**2`; 0 for none.
        pruning_ratio: the share of coordinates that are trained.
        mask: `static`, or `dynamic`.
        num_directions: P.
        difference: `central`, or `forward`, which costs P + 1 forward passes instead of 2P.
        clip_norm: C, the largest absolute value of one example's difference quotient along one direction.
        noise_multiplier: the noise's standard deviation on each quotient, in units of `sqrt(P)` clip norms.
        expected_batch_size: the public constant that the sum is divided by.
    """

    pruning_ratio: float = 0.01
    mask: str = "static"

    def pruning(self, stage: int) -> DataFreePruning | None:
        """A mask for the first stage, and where it is dynamic for each."""
        return DataFreePruning(ratio=self.pruning_ratio) if stage == 0 or self.mask == "dynamic" else None
