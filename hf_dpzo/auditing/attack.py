"""An attack on a mechanism, by an attacker who knows all rows but one.

Bounds on its error rates are those of Clopper and Pearson 1934.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special

from hf_dpzo.auditing.claims import GaussianClaim
from hf_dpzo.privacy.mechanism import NoisySum


# All bounds of the attacks hold at once, except with this probability.
ATTACK_ERROR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Roc:
    """The curve of the best attacker.

    Args:
        false_alarms: the shares of false alarms, one for each threshold.
        detections: the shares of detections at these thresholds.
        allowed: the largest shares of detections that the claim allows at these shares of false alarms.
    """

    false_alarms: tuple[float, ...]
    detections: tuple[float, ...]
    allowed: tuple[float, ...]


class Attack:
    """Releases of batches without and with one row, beside other rows as far from it as they can be.

    Args:
        mechanism: the mechanism to attack.
        quiet: the same mechanism with next to no noise, which shows the sums alone.
        canary: the row that is easiest to detect, `[K]`, in clip norms.
        others: the number of other rows.
        count: the number of releases without the row, and of releases with it.
    """

    def __init__(self, mechanism: NoisySum, quiet: NoisySum, canary: np.ndarray, others: int, count: int) -> None:
        self.name = f"a row beside {others} others" if others else "a row alone"
        row = mechanism.clip_norm * torch.from_numpy(canary)
        with_row = torch.stack([1000 * row, *[-10 * row] * others])
        values = np.stack([collect_releases(mechanism, rows, count) for rows in (with_row[1:], with_row)])
        self.noise = values - np.stack([collect_releases(quiet, rows, 1) for rows in (with_row[1:], with_row)])
        self._scores = values @ canary

    def lower_bound(self, measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
        """Return a lower bound on `measure` by one half of the releases, at the threshold that is best on the other."""
        tuning, testing = np.array_split(self._scores, 2, axis=1)
        thresholds = np.quantile(tuning, np.linspace(0.02, 0.98, 49))
        best = np.argmax(measure(*_bound_rates(tuning, thresholds)))
        return max(0.0, float(measure(*_bound_rates(testing, thresholds[best : best + 1]))[0]))

    def build_roc(self, claim: GaussianClaim) -> Roc:
        """Return the attacker's curve over 199 thresholds, beside the curve that `claim` allows."""
        thresholds = np.append(np.quantile(self._scores, np.linspace(1, 0, 199)), -np.inf)
        alarms, hits = (self._scores[:, None] > thresholds[:, None]).mean(axis=2)
        allowed = claim.detections(np.maximum(alarms, 1 / self._scores.shape[1]))  # No alarm could have been one.
        return Roc(false_alarms=(*alarms.tolist(),), detections=(*hits.tolist(),), allowed=(*allowed.tolist(),))


def collect_releases(mechanism: NoisySum, rows: torch.Tensor, count: int) -> np.ndarray:
    """Release the sum of `rows` `count` times; return `[count, K]` in clip norms over the expected batch size."""
    unit = mechanism.expected_batch_size / mechanism.clip_norm
    return unit * np.array([mechanism.release(rows).coefficients for _ in range(count)])


def _bound_rates(scores: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return upper bounds on the shares of false alarms, and lower bounds on those of detections, at `thresholds`."""
    alarms, hits = (scores[:, None] > thresholds[:, None]).sum(axis=2)
    count = scores.shape[1]
    error = ATTACK_ERROR / 4  # Two bounds for each of two attacks.
    upper = special.betaincinv(alarms + 1, np.maximum(count - alarms, 1), 1 - error)
    lower = special.betaincinv(np.maximum(hits, 1), count - hits + 1, error)
    return np.where(alarms < count, upper, 1.0), np.where(hits > 0, lower, 0.0)
