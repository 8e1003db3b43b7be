"""The most that a mechanism's noise allows an attacker to learn from one release."""

import math

import numpy as np
from scipy import special, stats


class GaussianClaim:
    """What Gaussian noise allows: the curve whose mu is one over the noise multiplier."""

    # Of the norm that sensitivity is measured in, and of the moment that is the noise's scale.
    order, symbol, distribution = 2, "mu", "norm"

    def __init__(self, noise_multiplier: float) -> None:
        self.noise_multiplier, self.strongest = noise_multiplier, 1 / noise_multiplier

    def canary(self, directions: int) -> np.ndarray:
        """The row, up to its length, that is told best. The best tests are thresholds on the projection."""
        return np.ones(directions)  # As long as a row can be, even where each coefficient is clipped by itself.

    def detections(self, alarms: np.ndarray) -> np.ndarray:
        """The largest shares that are allowed."""
        return special.ndtr(special.ndtri(alarms) + self.strongest)

    @staticmethod
    def strength(alarms: np.ndarray, detections: np.ndarray) -> np.ndarray:
        """One over the noise multiplier whose curve runs through these points."""
        return special.ndtri(detections) - special.ndtri(alarms)

    def scale(self, noise: np.ndarray) -> float:
        """Root mean square, or mean absolute value; never quite zero."""
        return max(float(np.mean(np.abs(noise) ** self.order)) ** (1 / self.order), 1e-300)

    def quantile(self, count: int, probability: float) -> float:
        """Of the scale of `count` draws of scale 1: a root of chi-squared."""
        degrees = 2 * count / self.order
        return float(stats.chi2.ppf(probability, degrees) / degrees) ** (1 / self.order)


class LaplaceClaim(GaussianClaim):
    """What Laplace noise allows, where neighbours differ in one coefficient (Dong, Roth and Su 2022)."""

    order, symbol, distribution = 1, "epsilon", "laplace"

    def canary(self, directions: int) -> np.ndarray:
        """Return a row of one coefficient, since neighbours differ in one alone."""
        return np.eye(directions)[0]

    def detections(self, alarms: np.ndarray) -> np.ndarray:
        """Return the largest shares of detections that are allowed at these shares of false alarms."""
        rare = max(math.exp(-self.strongest), 1e-300)
        middle = 1 - rare / (4 * np.maximum(alarms, rare / 2))
        return np.select([2 * alarms <= rare, alarms <= 0.5], [alarms / rare, middle], 1 - rare * (1 - alarms))

    @staticmethod
    def strength(alarms: np.ndarray, detections: np.ndarray) -> np.ndarray:
        """Return one over the noise multiplier whose curve runs through these points."""
        with np.errstate(divide="ignore"):
            low, high = np.log(detections / alarms), np.log((1 - alarms) / (1 - detections))
            return np.select([detections <= 0.5, alarms <= 0.5], [low, -np.log(4 * alarms * (1 - detections))], high)
