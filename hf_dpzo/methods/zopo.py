"""DP-ZOPO: DP-ZOSO on a few coordinates, which are chosen without data."""

from dataclasses import dataclass

from hf_dpzo.methods.zoso import ZOSO
from hf_dpzo.zo.pruning import DataFreePruning


MASK_SCHEDULES = ("static", "dynamic")


@dataclass(frozen=True, kw_only=True)
class ZOPO(ZOSO):
    """The stage-wise pruning method of Liu et al. 2025.

    A mask selects the coordinates that are perturbed and updated. It is computed from the weights and public randomness
    (`zo/pruning.py`), so it costs no privacy. In the published code, masked perturbations and updates edit copies, so
    nothing is trained at all. It weighs the selected coordinates equally or by rank; this code weighs them equally.

    The published code has the static mask alone. `dynamic` is an interpretation of what the paper calls dynamic: a new
    mask from the current weights at the beginning of each stage. The paper's incremental strategy is left out, because
    the paper does not make clear what it adds, and when.

    Args:
        smoothing: mu in the first stage; the authors' zo_eps_start.
        final_smoothing: mu in the last stage; by default the same as in the first.
        num_stages: S, the number of stages.
        anchor_strength: rho in the regularizer `rho / 2 * ||theta - theta_s||**2`; 0 for no regularizer.
        pruning_ratio: the share of coordinates that are trained.
        mask: `static`, for one mask throughout, or `dynamic`, for a new one in each stage.
        num_directions: P, the number of directions.
        difference: `central`, or `forward`, which costs P + 1 forward passes instead of 2P.
        clip_norm: C, the largest absolute value of one example's difference quotient along one direction.
        noise_multiplier: the noise's standard deviation on each quotient, in units of `sqrt(P)` clip norms.
        expected_batch_size: the public constant that the sum is divided by.
    """

    pruning_ratio: float = 0.01
    mask: str = "static"

    def pruning(self, stage: int) -> DataFreePruning | None:
        """Return the rule that chooses the mask: in the first stage, and with a dynamic mask in each."""
        return DataFreePruning(ratio=self.pruning_ratio) if stage == 0 or self.mask == "dynamic" else None
