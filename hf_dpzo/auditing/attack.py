"""An attack on a mechanism, by an attacker who knows all rows but one."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special

from hf_dpzo.auditing.claims import GaussianClaim
from hf_dpzo.privacy.mechanism import NoisySum


# All bounds of the attacks hold together, but for this chance.
ATTACK_ERROR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Roc:
    """The best attacker: shares of false alarms, of detections, and of the most detections that are allowed there."""

    false_alarms: tuple[float, ...]
    detections: tuple[float, ...]
    allowed: tuple[float, ...]


class Attack:
    """Releases without a row and with it, beside others that lie as far from it as they can."""

    def __init__(self, mechanism: NoisySum, quiet: NoisySum, canary: np.ndarray, others: int, count: int) -> None:
        self.name = f"a row beside {others} others" if others else "a row alone"
        row = mechanism.clip_norm * torch.from_numpy(canary)
        with_row = torch.stack([1000 * row, *[-10 * row] * others])
        values = np.stack([collect_releases(mechanism, rows, count) for rows in (with_row[1:], with_row)])
        self.noise = values - np.stack([collect_releases(quiet, rows, 1) for rows in (with_row[1:], with_row)])
        self._scores = values @ canary

    def lower_bound(self, measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
        """From below, by one half of the releases, at the threshold that is best on the other."""
        chosen, judged = np.array_split(self._scores, 2, axis=1)
        thresholds = np.quantile(chosen, np.linspace(0.02, 0.98, 49))
        best = np.argmax(measure(*_rates(chosen, thresholds)))
        return max(0.0, float(measure(*_rates(judged, thresholds[best : best + 1]))[0]))

    def build_roc(self, claim: GaussianClaim) -> Roc:
        """Return the attacker's curve over 199 thresholds, beside the curve that `claim` allows."""
        thresholds = np.append(np.quantile(self._scores, np.linspace(1, 0, 199)), -np.inf)
        alarms, hits = (self._scores[:, None] > thresholds[:, None]).mean(axis=2)
        allowed = claim.detections(np.maximum(alarms, 1 / self._scores.shape[1]))  # No alarm may be up to one.
        return Roc(false_alarms=(*alarms.tolist(),), detections=(*hits.tolist(),), allowed=(*allowed.tolist(),))


def collect_releases(mechanism: NoisySum, rows: torch.Tensor, count: int) -> np.ndarray:
    """Release the sum of `rows` `count` times; return `[count, K]` in clip norms over the expected batch size."""
    unit = mechanism.expected_batch_size / mechanism.clip_norm
    return unit * np.array([mechanism.release(rows).coefficients for _ in range(count)])


def _rates(scores: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of false alarms, an upper bound, and of detections, a lower one (Clopper and Pearson 1934)."""
    alarms, hits = (scores[:, None] > thresholds[:, None]).sum(axis=2)
    count, error = scores.shape[1], ATTACK_ERROR / 4  # Two bounds, two attacks.
    upper = special.betaincinv(alarms + 1, np.maximum(count - alarms, 1), 1 - error)
    lower = special.betaincinv(np.maximum(hits, 1), count - hits + 1, error)
    return np.where(alarms < count, upper, 1.0), np.where(hits > 0, lower, 0.0)
