"""What guesses about canaries say of the privacy of the one run that released what they were made from.

Each canary was in or out of the data by a fair coin, independently. From what was released, an auditor guesses the
coins of a fixed number of canaries. The more guesses are right, the less private the run can have been.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import special, stats

from hf_dpzo.privacy.interpretation import compute_profile
from hf_dpzo.privacy.queries import Releases


# Below this, a probability is not searched for any further.
_MIN_CHANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A promise of privacy: (epsilon, delta)-differential privacy at several pairs of a delta and an epsilon at once.

    Args:
        pairs: the pairs. Each holds for neighbours that differ by one canary, in both directions.
    """

    pairs: tuple[tuple[float, float], ...]

    @classmethod
    def of_releases(cls, releases: Releases, *, delta: float) -> "Promise":
        """Return all that holds for `releases`: the epsilon at `delta`, and the curve of epsilon over delta."""
        return cls(pairs=tuple(compute_profile(releases, delta)))

    def chance(self, *, canaries: int, guesses: int, correct: int) -> float:
        """Return an upper bound on the probability of `correct` or more right guesses, where the promise holds.

        It is the smallest of the bounds of `_bound_by_pair` and `_bound_by_curve`, each of which holds for every
        number of right guesses. So it is a p-value, whatever the guesses were made by.

        Args:
            canaries: m, the number of canaries.
            guesses: the number of canaries whose coins are guessed, which does not depend on what was released.
            correct: the number of right guesses.

        >>> pure = Promise(pairs=((0.0, 1.0),))  # Each guess is right with probability 0.731 at most.
        >>> round(pure.chance(canaries=100, guesses=20, correct=20), 4)
        0.0019
        """
        bounds = [_bound_by_pair(canaries, guesses, correct, epsilon, delta) for delta, epsilon in self.pairs]
        return min([1.0, *bounds, self._bound_by_curve(canaries, guesses, correct)])

    def _bound_by_curve(self, canaries: int, guesses: int, correct: int) -> float:
        """Return the bound that follows from all pairs together (Mahloujifar, Melis and Chaudhuri 2024).

        Let N be the number of right guesses, `right[i]` the expected number of right guesses where N >= i, and
        `wrong[i]` that of wrong ones. Take the same release with one canary's coin turned: a right guess about it
        becomes a wrong one, and N becomes N - 1. The promise bounds how much likelier the release was with the first
        coin, by a concave curve g from false alarms to detections. So `right[i + 1] / m <= g(wrong[i] / m)`, on average
        over canaries and coins. If N >= `correct` had probability p, each `wrong[i]` below would have to be as large as
        this asks for, from `correct - 1` down. Where that takes more guesses than there are, N >= `correct` has a
        probability below p.
        """
        if correct == 0:
            return 1.0
        low, high = math.log(_MIN_CHANCE), 0.0
        while high - low > 0.01:
            middle = (low + high) / 2
            if self._count_needed(canaries, guesses, correct, math.exp(middle)) > guesses:
                high = middle
            else:
                low = middle
        return math.exp(high)

    def _count_needed(self, canaries: int, guesses: int, correct: int, probability: float) -> float:
        """Return the fewest guesses of which `correct` or more could be right with `probability`, or some too many."""
        right, wrong = probability * correct, probability * (guesses - correct)
        for i in range(correct - 1, -1, -1):
            needed = max(wrong, canaries * self._least_false_alarms(right / canaries))
            right += i / (guesses - i) * (needed - wrong)
            wrong = needed
            if right + wrong > guesses:
                break
        return right + wrong

    def _least_false_alarms(self, detected: float) -> float:
        """Return the least share of false alarms with which a test detects the share `detected`: the inverse of g."""
        deltas, shrunk, grown = self._curve
        return float(np.max(np.maximum((detected - deltas) * shrunk, 1 - deltas - (1 - detected) * grown)))

    @cached_property
    def _curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each delta, `exp(-epsilon)`, and `exp(epsilon)`, which is a smaller number where it would overflow."""
        deltas, epsilons = np.array(self.pairs).T
        return deltas, np.exp(-epsilons), np.exp(np.minimum(epsilons, 700.0))


def _bound_by_pair(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the bound that follows from one pair (Steinke, Nasr and Jagielski 2023, theorem 5.2).

    With delta 0, the right guesses are at most as many as if each were right with probability `1 / (1 + exp(-epsilon))`
    by itself. A delta adds `2 m delta` times the largest average, over i, of the probability that they are from
    `correct - i` to `correct - 1`.
    """
    share = special.expit(epsilon)
    below = stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, share).cumsum()
    average = float(np.max(below / np.arange(1, correct + 1), initial=0.0))
    return float(stats.binom.sf(correct - 1, guesses, share)) + 2 * canaries * delta * average


def find_threshold(is_rejected: Callable[[float], bool], *, low: float, high: float, precision: float = 1e-3) -> float:
    """Return the largest value that is rejected where all smaller ones are too; `low` if none is, or `high` if all are.

    Args:
        is_rejected: whether a value is rejected.
        low: the smallest value, above 0.
        high: the largest value.
        precision: the relative width to search to.

    >>> round(find_threshold(lambda value: value < 3, low=0.01, high=100), 1)
    3.0
    """
    if not is_rejected(low):
        return low
    if is_rejected(high):
        return high
    while high > low * (1 + precision):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_rejected(middle) else (low, middle)
    return low
