"""The most that a mechanism's noise allows an attacker to learn from one release."""

import math

import numpy as np
from scipy import special, stats


class GaussianClaim:
    """The claim of Gaussian noise: a trade-off curve whose mu is one over the noise multiplier.

    Args:
        noise_multiplier: the scale of the noise, in sensitivities.
    """

    # The order of the norm that measures sensitivity, and of the moment that is the noise's scale.
    order = 2
    symbol = "mu"
    # The name in `scipy.stats`.
    distribution = "norm"

    def __init__(self, noise_multiplier: float) -> None:
        self.noise_multiplier = noise_multiplier
        self.strongest = 1 / noise_multiplier

    def canary(self, directions: int) -> np.ndarray:
        """Return the row that is easiest to detect, `[K]`. The best tests are thresholds on the projection onto it."""
        return np.ones(directions)  # As long as a row can be, even if each coefficient is clipped separately.

    def detections(self, alarms: np.ndarray) -> np.ndarray:
        """Return the largest shares of detections that are allowed at these shares of false `alarms`."""
        return special.ndtr(special.ndtri(alarms) + self.strongest)

    @staticmethod
    def strength(alarms: np.ndarray, detections: np.ndarray) -> np.ndarray:
        """Return one over the noise multiplier whose curve runs through these points."""
        return special.ndtri(detections) - special.ndtri(alarms)

    def scale(self, noise: np.ndarray) -> float:
        """Return the scale of `noise`: its root mean square, or its mean absolute value; never quite zero."""
        return max(float(np.mean(np.abs(noise) ** self.order)) ** (1 / self.order), 1e-300)

    def quantile(self, count: int, probability: float) -> float:
        """Return a quantile of the scale of `count` draws of scale 1, which is a root of chi-squared."""
        degrees = 2 * count / self.order
        return float(stats.chi2.ppf(probability, degrees) / degrees) ** (1 / self.order)

    def chance(self, count: int, scale: float) -> float:
        """Return the probability that `count` draws of scale 1 have a scale of `scale` or less."""
        degrees = 2 * count / self.order
        return float(stats.chi2.cdf(degrees * scale**self.order, degrees))


class LaplaceClaim(GaussianClaim):
    """The claim of Laplace noise, if neighbours differ in one coefficient (Dong, Roth and Su 2022)."""

    order = 1
    symbol = "epsilon"
    distribution = "laplace"

    def canary(self, directions: int) -> np.ndarray:
        """Return a row with one coefficient, because neighbours differ in one alone."""
        return np.eye(directions)[0]

    def detections(self, alarms: np.ndarray) -> np.ndarray:
        """Return the largest shares of detections that are allowed at these shares of false `alarms`."""
        rare = max(math.exp(-self.strongest), 1e-300)
        middle = 1 - rare / (4 * np.maximum(alarms, rare / 2))
        return np.select([2 * alarms <= rare, alarms <= 0.5], [alarms / rare, middle], 1 - rare * (1 - alarms))

    @staticmethod
    def strength(alarms: np.ndarray, detections: np.ndarray) -> np.ndarray:
        """Return one over the noise multiplier whose curve runs through these points."""
        with np.errstate(divide="ignore"):
            low, high = np.log(detections / alarms), np.log((1 - alarms) / (1 - detections))
            return np.select([detections <= 0.5, alarms <= 0.5], [low, -np.log(4 * alarms * (1 - detections))], high)
