"""Scores of canaries: how much likelier what was released is if a canary was in the data.

Directions and releases are public, and so are canaries. So an auditor knows at each step what a canary adds, if it
takes part: its own clipped coefficients.
"""

from dataclasses import dataclass

import numpy as np


# The number of times that the variance is estimated anew; it has settled by then.
_ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What an auditor has of a run, in clip norms.

    Args:
        coefficients: what each canary adds to the sum of a step that it takes part in, `[canaries, steps, K]`.
        released: what was released: sums with noise, `[steps, K]`.
        sampling_rate: the probability with which each canary takes part in a step.
        noise_variance: the variance of the noise in each released number, as it is claimed.
    """

    coefficients: np.ndarray
    released: np.ndarray
    sampling_rate: float
    noise_variance: float

    def predict(self, coins: np.ndarray) -> np.ndarray:
        """Return what the canaries with a true coin of `coins` add to each sum on average, `[steps, K]`."""
        return self.sampling_rate * self.coefficients[coins].sum(axis=0)


def score_canaries(evidence: Evidence) -> np.ndarray:
    """Return the score of each canary, `[canaries]`: a sum over steps of log-likelihood ratios.

    A ratio is `log(1 - q + q exp((<c, r> - |c|^2 / 2) / v))`, where c is what the canary adds, and r what was released
    without what the other canaries are expected to have added. Those expectations are not known. They are estimated
    from all of the releases at once, by the best linear estimate, for each canary without the canary itself. The
    variance v is that of the noise, and of whatever else is not known: it is estimated too. Nothing is proved about
    scores, and nothing has to be: what guesses prove does not depend on how they were made.
    """
    coefficients = evidence.coefficients
    count, rate = len(coefficients), evidence.sampling_rate
    expected = rate * coefficients.reshape(count, -1)
    centred = evidence.released.ravel() - expected.sum(axis=0) / 2
    values, vectors = np.linalg.eigh(expected @ expected.T)
    values = np.maximum(values, 0.0)
    seen = vectors.T @ (expected @ centred)
    variance = _estimate_variance(values, seen, centred, evidence.noise_variance)
    inverse = (vectors / (values + 4 * variance)) @ vectors.T
    # With S the covariance of a release, in which each coin has variance 1/4: v / S, applied to each canary's part.
    whitened = expected - inverse @ (expected @ expected.T) @ expected
    rest = centred - expected.T @ (inverse @ (expected @ centred))
    gain = np.einsum("ij,ij->i", expected, whitened) / variance
    # The same without the canary itself, by the formula of Sherman and Morrison.
    share = (expected @ rest / variance + gain / 2) / 4 / (1 - gain / 4)
    residual = (rest + whitened * (0.5 + share)[:, None]).reshape(coefficients.shape)
    products = (coefficients * residual).sum(axis=2) - (coefficients**2).sum(axis=2) / 2
    absent = np.log1p(-rate) if rate < 1 else -np.inf
    return np.logaddexp(absent, np.log(rate) + products / variance).sum(axis=1)


def _estimate_variance(values: np.ndarray, seen: np.ndarray, centred: np.ndarray, least: float) -> float:
    """Return the variance of what the canaries do not explain, by expectation maximization; `least` at least."""
    variance = max(least, float(centred @ centred) / centred.size)
    for _ in range(_ROUNDS):
        mean = seen / (values + 4 * variance)
        unexplained = centred @ centred - 2 * mean @ seen + (values * mean) @ mean
        spread = variance * (values / (values + 4 * variance)).sum()
        variance = max(least, float(unexplained + spread) / centred.size)
    return variance


def guess_coins(scores: np.ndarray, guesses: int) -> np.ndarray:
    """Return a guess for each canary: 1 for in, 0 for out, and -1 for no guess, `[canaries]`.

    The higher half of `guesses` canaries, an even number, are guessed to be in, and the lower half to be out.

    >>> guess_coins(np.array([0.3, -2.0, 5.0, 0.1]), guesses=2).tolist()
    [-1, 0, 1, -1]
    """
    order = np.argsort(scores, kind="stable")
    guessed = np.full(len(scores), -1)
    guessed[order[: guesses // 2]] = 0
    guessed[order[len(order) - guesses // 2 :]] = 1
    return guessed
