"""What an epsilon means in plain numbers: how well an attacker can tell whether one unit was in the data.

The numbers are read off the privacy loss distribution where there is one, because one epsilon at one delta says much
less.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hf_dpzo.privacy.accounting import (
    COARSE_GRID,
    MAX_EPSILON,
    MIN_PLD_DELTA,
    account,
    account_for_group,
    build_group_accountant,
    build_pld_accountant,
    choose_grids,
    pld_applies,
)
from hf_dpzo.privacy.cost import PointLimit, predict_width
from hf_dpzo.privacy.dense import read_epsilon
from hf_dpzo.privacy.queries import Releases


# The deltas at which a guarantee is stated in addition to its own.
CURVE_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)


# The epsilon at each of these deltas bounds the rate at which an attacker detects rows. More deltas, or a finer grid,
# would lower the bound by a relative 1e-4.
_DETECTION_DELTAS = tuple(float(delta) for delta in np.logspace(-6, -0.01, 100))


# Each of these deltas takes a time of its own, which grows with the number of points.
_PROFILE_LIMIT = PointLimit(single=600_000, composed=200_000)


@lru_cache(maxsize=256)
def membership_accuracy(releases: Releases, *, delta: float) -> float:
    """Return an upper bound on how often the best guess whether one row was used is right, from even odds.

    The best guess is right with probability `(1 + TV) / 2`, where TV is the total variation distance between the
    outputs on neighbouring data sets. TV is read off the privacy loss distribution where there is one, and bounded by
    epsilon and delta otherwise.

    Args:
        releases: pairs of a query and the number of times it ran.
        delta: the delta at which epsilon is stated.

    >>> from hf_dpzo.privacy.queries import GaussianQuery
    >>> round(membership_accuracy(((GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1),), delta=1e-5), 3)
    0.691
    """
    if not releases:
        return 0.5
    epsilon = account(releases, delta=delta).epsilon
    if epsilon > MAX_EPSILON:
        return 1.0
    bounds = [(math.exp(epsilon) + delta) / (1 + math.exp(epsilon))] if epsilon < 700 else [1.0]
    if pld_applies(releases, MIN_PLD_DELTA):  # TV is delta at epsilon 0, whatever the stated delta is.
        bounds += [
            (1 + float(build_pld_accountant(releases, grid).get_delta(0.0))) / 2
            for grid in choose_grids(releases, epsilon)
        ]
    return min(bounds)


@lru_cache(maxsize=256)
def detection_rate(releases: Releases, *, delta: float, false_alarms: float = 0.01) -> float:
    """Return an upper bound on the share of used rows that an attacker detects, given a rate of false alarms.

    Each (epsilon, delta) that holds gives two bounds. One is `false_alarms * exp(epsilon) + delta`. The other follows
    in the same way with the roles of used and unused rows exchanged (Kairouz, Oh and Viswanath 2015, theorem 2.1).

    Args:
        releases: pairs of a query and the number of times it ran.
        delta: the delta at which epsilon is stated.
        false_alarms: the share of unused rows that the attacker takes for used ones.

    >>> from hf_dpzo.privacy.queries import GaussianQuery
    >>> round(detection_rate(((GaussianQuery(noise_multiplier=1.25, sampling_rate=1.0), 1),), delta=1e-5), 4)
    0.0635
    """
    if not releases:
        return false_alarms
    if account(releases, delta=delta).epsilon > MAX_EPSILON:
        return 1.0
    return _bound_detection(compute_profile(releases, delta), false_alarms)


@lru_cache(maxsize=256)
def privacy_curve(releases: Releases, *, delta: float) -> tuple[tuple[float, float], ...]:
    """Return pairs of a delta and the epsilon that holds with it, `delta` among them, from the largest delta down.

    Deltas for which no finite epsilon is known are left out.
    """
    deltas = sorted({*CURVE_DELTAS, delta}, reverse=True)
    pairs = [(stated_delta, account(releases, delta=stated_delta).epsilon) for stated_delta in deltas]
    return tuple((stated_delta, epsilon) for stated_delta, epsilon in pairs if math.isfinite(epsilon))


def compute_profile(releases: Releases, delta: float) -> list[tuple[float, float]]:
    """Return pairs of a delta and an epsilon that holds with it, at the deltas that bound an attacker."""
    spent = account(releases, delta=delta)
    pairs = [(delta, spent.epsilon), *([] if spent.pure is None else [(0.0, spent.pure)])]
    if pld_applies(releases, min(_DETECTION_DELTAS)):
        accountant = build_pld_accountant(releases, predict_width(releases).choose_grid(COARSE_GRID, _PROFILE_LIMIT))
        return pairs + [(pld_delta, read_epsilon(accountant, pld_delta)) for pld_delta in _DETECTION_DELTAS]
    return pairs + [(curve_delta, account(releases, delta=curve_delta).epsilon) for curve_delta in CURVE_DELTAS]


@lru_cache(maxsize=64)
def group_attacks(releases: Releases, *, size: int, delta: float, false_alarms: float = 0.01) -> tuple[float, float]:
    """Return `membership_accuracy` and `detection_rate` for a person with up to `size` rows.

    Args:
        releases: pairs of a query and the number of times it ran.
        size: the largest number of rows that the person has.
        delta: the delta at which epsilon is stated.
        false_alarms: the share of people without rows whom the attacker takes for people with some.

    >>> from hf_dpzo.privacy.queries import GaussianQuery
    >>> release = (GaussianQuery(noise_multiplier=2.0, sampling_rate=1.0), 1)
    >>> [round(bound, 2) for bound in group_attacks((release,), size=2, delta=1e-5)]
    [0.69, 0.09]
    """
    epsilon = account_for_group(releases, size=size, delta=delta)
    accountant = build_group_accountant(releases, size=size, delta=delta)
    pairs, guesses = [(delta, epsilon)], [1.0]
    if accountant is not None:
        pairs += [(valid, read_epsilon(accountant, valid)) for valid in _DETECTION_DELTAS]
        guesses.append((1 + float(accountant.get_delta(0.0))) / 2)
    if epsilon < 700:
        guesses.append((math.exp(epsilon) + delta) / (1 + math.exp(epsilon)))
    return min(guesses), _bound_detection(pairs, false_alarms)


def _bound_detection(pairs: Sequence[tuple[float, float]], false_alarms: float) -> float:
    """Return the least bound on what is detected that follows from pairs of a delta and an epsilon that hold."""
    bounds = [1.0]
    for valid_delta, epsilon in pairs:
        if epsilon < 700:  # Beyond, exp overflows.
            bounds.append(false_alarms * math.exp(epsilon) + valid_delta)
            bounds.append(1 - (1 - false_alarms - valid_delta) * math.exp(-epsilon))
    return min(bounds)
