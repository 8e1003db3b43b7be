"""Pruning without data: a choice of the coordinates to train, by the curvature that the weights themselves show.

The rule is that of Liu et al. 2025, as their published code states it (prune.py). Replace all weights by their absolute
values (SynFlow), feed the model one token, and estimate the gradient g of the sum of its outputs from one random
direction. Step along g, estimate the gradient g' there, and score each coordinate by `|theta * (g' - g)|` (GraSP). The
coordinates with the lowest scores are kept.

An estimate from one direction is a multiple of that direction, so the rule mostly keeps coordinates with small weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from hf_dpzo.zo.directions import Gaussian
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.walk import CopyingWalk, ProbePoint, Walk


# The first step number that pruning draws directions from. No training step gets there.
_FIRST_STEP = 1 << 63


@dataclass(frozen=True, kw_only=True)
class DataFreePruning:
    """Keeps the trainable coordinates with the lowest scores.

    Costs four forward passes on one token and, while it works, two float32 copies of the trained parameters.

    Args:
        ratio: the share of coordinates to keep, in (0, 1].
        smoothing: the distance from theta to a probe point, in units of a direction.
    """

    ratio: float
    smoothing: float = 1e-3

    @torch.no_grad()
    def compute_mask(
        self,
        outputs: Callable[[], torch.Tensor],
        weights: Sequence[torch.Tensor],
        trained: Sequence[torch.Tensor],
        *,
        seed: int,
        stage: int,
    ) -> Mask:
        """Return the mask of the coordinates of `trained` to keep, from the weights and the public seed alone.

        Args:
            outputs: evaluates the model on one made-up token.
            weights: all of the model's parameters, those of `trained` included. All are put back at the end.
            trained: the trainable parameters, in the order of the directions.
            seed: the run's public seed.
            stage: the stage's number, from 0.

        Raises:
            ValueError: the model's outputs overflow if its weights are replaced by their absolute values.
        """
        with _absolute_weights(weights):
            scores = self._compute_scores(outputs, trained, seed=seed, first_step=_FIRST_STEP + 2 * stage)
        return Mask(_select_lowest(scores, self.ratio, seed=seed, stage=stage))

    def _compute_scores(
        self, outputs: Callable[[], torch.Tensor], trained: Sequence[torch.Tensor], *, seed: int, first_step: int
    ) -> list[np.ndarray]:
        directions = Gaussian(seed=seed, sizes=[parameter.numel() for parameter in trained])
        sides = [ProbePoint(direction=0, position=side) for side in (+self.smoothing, -self.smoothing)]
        with CopyingWalk(trained, directions, step=first_step, points=sides) as near:
            first = self._estimate_slope(near, outputs)
            near.move_to(ProbePoint(direction=0, position=first * self.smoothing))
            with CopyingWalk(trained, directions, step=first_step + 1, points=sides) as far:
                second = self._estimate_slope(far, outputs)
        if not (np.isfinite(first) and np.isfinite(second)):
            raise ValueError(
                "pruning: the model's outputs overflow for absolute weights; use zoso, which needs no mask."
            )
        scores = []
        for index, parameter in enumerate(trained):
            score = torch.zeros(parameter.numel())
            directions.add_(score, index=index, step=first_step, weights={0: -first})
            directions.add_(score, index=index, step=first_step + 1, weights={0: second})
            scores.append(score.mul_(parameter.view(-1).cpu()).abs_().numpy())
        return scores

    @staticmethod
    def _estimate_slope(walk: Walk, outputs: Callable[[], torch.Tensor]) -> float:
        """Return half the difference of the summed outputs between the two probe points of `walk`."""
        above, below = [outputs().double().sum() for _ in walk]
        return float(above - below) / 2


@contextmanager
def _absolute_weights(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Replace weights by their absolute values for the body of a `with` statement, and restore the signs after it."""
    weights = [weight for weight in weights if weight.is_floating_point()]
    signs = [weight.signbit() for weight in weights]
    for weight in weights:
        weight.abs_()
    try:
        yield
    finally:
        for weight, is_negative in zip(weights, signs, strict=True):
            weight.copy_(torch.where(is_negative, -weight, weight))


def _select_lowest(scores: Sequence[np.ndarray], ratio: float, *, seed: int, stage: int) -> list[np.ndarray]:
    """Return a boolean array for each parameter that selects the share `ratio` of lowest scores, at least one.

    The share is exact: among scores equal to the threshold, the choice is random, from the public seed.
    """
    flat = np.concatenate(scores)
    keep = max(1, int(ratio * flat.size))
    threshold = np.partition(flat, keep - 1)[keep - 1]
    selected = flat < threshold
    ties = np.flatnonzero(flat == threshold)
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, _FIRST_STEP + stage], dtype=np.uint64)))
    selected[generator.permutation(ties)[: keep - np.count_nonzero(selected)]] = True
    return np.split(selected, np.cumsum([score.size for score in scores])[:-1])
