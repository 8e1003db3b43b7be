"""What an epsilon means in plain numbers: how well anybody could tell whether one unit was in the data.

Read off the privacy loss distribution where there is one, for one epsilon at one delta says much less.
"""

import math
from functools import lru_cache

import numpy as np

from hf_dpzo.privacy.accounting import (
    COARSE_GRID,
    MAX_EPSILON,
    MIN_PLD_DELTA,
    account,
    build_pld_accountant,
    choose_grids,
    count_releases,
    pld_applies,
)
from hf_dpzo.privacy.queries import Releases


# At which the guarantee is stated besides its own delta.
CURVE_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)


# Of which each bounds what an attacker detects; more of them, or a finer grid, would lower that by some 1e-4 of it.
_DELTAS = tuple(float(delta) for delta in np.logspace(-6, -0.01, 100))


@lru_cache(maxsize=256)
def membership_accuracy(releases: Releases, *, delta: float) -> float:
    """How often the best possible guess whether one row was used is right, from even odds: an upper bound.

    It is `(1 + TV) / 2`, with the total variation distance between the outputs on neighbouring data sets, read off the
    privacy loss distribution where there is one and bounded by epsilon and delta otherwise.

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
    if pld_applies(releases, MIN_PLD_DELTA):  # It is asked at epsilon 0, whatever the stated delta is.
        bounds += [
            (1 + float(build_pld_accountant(releases, grid).get_delta(0.0))) / 2
            for grid in choose_grids(count_releases(releases), epsilon)
        ]
    return min(bounds)


@lru_cache(maxsize=256)
def detection_rate(releases: Releases, *, delta: float, false_alarms: float = 0.01) -> float:
    """The largest share of used rows that an attacker may detect who wrongly accuses `false_alarms` of the others.

    Of every (epsilon, delta) that holds, both `false_alarms * exp(epsilon) + delta` and the same for the test that is
    turned around are upper bounds (Kairouz, Oh and Viswanath 2015, theorem 2.1).

    >>> from hf_dpzo.privacy.queries import GaussianQuery
    >>> round(detection_rate(((GaussianQuery(noise_multiplier=1.25, sampling_rate=1.0), 1),), delta=1e-5), 4)
    0.0635
    """
    if not releases:
        return false_alarms
    if account(releases, delta=delta).epsilon > MAX_EPSILON:
        return 1.0
    bounds = [1.0]
    for at, epsilon in _profile(releases, delta):
        if epsilon < 700:
            bounds.append(false_alarms * math.exp(epsilon) + at)
            bounds.append(1 - (1 - false_alarms - at) * math.exp(-epsilon))
    return min(bounds)


@lru_cache(maxsize=256)
def privacy_curve(releases: Releases, *, delta: float) -> tuple[tuple[float, float], ...]:
    """Pairs of a delta and the epsilon that holds with it, `delta` among them, from the largest delta on."""
    stated = [(at, account(releases, delta=at).epsilon) for at in sorted({*CURVE_DELTAS, delta}, reverse=True)]
    return tuple((at, epsilon) for at, epsilon in stated if math.isfinite(epsilon))


def _profile(releases: Releases, delta: float) -> list[tuple[float, float]]:
    spent = account(releases, delta=delta)
    pairs = [(delta, spent.epsilon), *([] if spent.pure is None else [(0.0, spent.pure)])]
    if pld_applies(releases, min(_DELTAS)):
        accountant = build_pld_accountant(releases, COARSE_GRID)
        return pairs + [(at, float(accountant.get_epsilon(at))) for at in _DELTAS]
    return pairs + [(at, account(releases, delta=at).epsilon) for at in CURVE_DELTAS]
