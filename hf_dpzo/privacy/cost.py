"""What a privacy loss distribution (PLD) will cost to compute, predicted from the plan alone, before anything is built.

A plan that a stranger wrote may ask for millions of points and for minutes. The widths that dp-accounting will need
follow from the distribution of the loss of one release: its range, and the bounds that Chernoff's inequality gives for
the sum of all. They are computed here from a few thousand points. Where a grid would have too many points, a coarser
one is taken: it still gives an upper bound, only a looser one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, Releases


# dp-accounting cuts off tails of these masses: of one release, and of all together.
_LOG_TAIL_OF_ONE, _LOG_TAIL_OF_ALL = -50.0, math.log(1e-15)


# The standard deviations beyond which normal noise counts as a tail.
_REACH = math.sqrt(-2 * _LOG_TAIL_OF_ONE)


# The orders at which dp-accounting bounds the tails of the sum, times the number of points of one release.
_ORDERS = np.arange(1, 21)


# The number of points of the noise at which the loss is computed here.
_POINTS = 4001


@dataclass(frozen=True, kw_only=True)
class PointLimit:
    """The most points that a PLD may have. They stand for time and for memory.

    Args:
        single: of one release, for both neighbours together. Each takes microseconds, and for groups a fifth of a
            millisecond.
        composed: of all releases. Each takes a microsecond, and a hundred bytes.
    """

    single: int
    composed: int


@dataclass(frozen=True, kw_only=True)
class LossWidth:
    """The widths of the distributions of the privacy loss, in units of the loss.

    Args:
        single: of one release, for both neighbours together.
        composed: of all releases.
        releases: their number.
    """

    single: float
    composed: float
    releases: int

    def choose_grid(self, wanted: float, limit: PointLimit) -> float:
        """Return the finest grid that is no finer than `wanted`, and on which there are no more points than `limit`.

        >>> LossWidth(single=10, composed=100, releases=1).choose_grid(1e-3, PointLimit(single=10**6, composed=10**6))
        0.001
        """
        # Rounding to a grid widens the sum by a little for each release.
        points = limit.composed - 9 * math.sqrt(self.releases)
        if points <= 0:
            return math.inf
        return max(wanted, self.single / limit.single, self.composed / points)


@lru_cache(maxsize=256)
def predict_width(releases: Releases, *, size: int = 1, sensitivity: float = 1.0) -> LossWidth:
    """Predict the widths of the PLD of `releases`, for neighbours that differ by `size` units.

    Args:
        releases: pairs of a query and the number of times it ran.
        size: the number of units by which neighbours differ.
        sensitivity: the largest change of a sum by one unit, in units of what the noise multiplier is relative to.

    >>> release = (GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01), 1000)
    >>> width = predict_width((release,))
    >>> 5 < width.single < 20 and width.single < width.composed < 100
    True
    """
    widths = [_predict_one(query, count, size, sensitivity) for query, count in releases]
    return LossWidth(
        single=sum(width.single for width in widths),
        composed=sum(width.composed for width in widths),
        releases=sum(count for _, count in releases),
    )


def _predict_one(query: GaussianQuery | LaplaceQuery, count: int, size: int, sensitivity: float) -> LossWidth:
    scale = query.noise_multiplier / sensitivity
    if isinstance(query, GaussianQuery) and query.sampling_rate == 1 and size == 1:
        # dp-accounting takes all of these releases for one, with less noise, whose losses are normal.
        width = 2 * _REACH * math.sqrt(count) / scale
        return LossWidth(single=2 * width, composed=width, releases=1)
    q = query.sampling_rate
    shares = {k: math.comb(size, k) * q**k * (1 - q) ** (size - k) for k in range(size + 1)}
    is_gaussian = isinstance(query, GaussianQuery)
    noise, losses = _compute_losses(scale, shares, is_gaussian=is_gaussian)
    span = float(losses.max() - losses.min())
    sums = [
        _bound_sum(losses, noise + losses, count, span),  # Of a unit that is removed.
        _bound_sum(-losses, noise, count, span),  # Of a unit that is added.
    ]
    return LossWidth(single=2 * span, composed=max(span, *sums), releases=count)


def _compute_losses(scale: float, shares: Mapping[int, float], *, is_gaussian: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return log probabilities of points of the noise, without the units, and the loss at each point `[points]`."""
    reach = _REACH if is_gaussian else -_LOG_TAIL_OF_ONE
    points = np.linspace(-reach * scale, max(shares) + reach * scale, _POINTS)

    def log_density(center: float) -> np.ndarray:
        distance = np.abs(points - center) / scale
        return -(distance**2) / 2 if is_gaussian else -distance

    present = {k: share for k, share in shares.items() if share > 0}
    parts = np.stack([log_density(k) + math.log(share) for k, share in present.items()])
    without = log_density(0)
    return without - special.logsumexp(without), special.logsumexp(parts, axis=0) - without


def _bound_sum(losses: np.ndarray, log_mass: np.ndarray, count: int, span: float) -> float:
    """Return the width outside of which a sum of `count` losses hardly ever lies, as dp-accounting bounds it."""
    if span == 0:
        return 0.0
    orders = _ORDERS / span
    log_mass = log_mass - special.logsumexp(log_mass)
    tail = math.log(2) - _LOG_TAIL_OF_ALL
    upper, lower = (
        min((count * special.logsumexp(log_mass + sign * t * losses) + tail) / t for t in orders) for sign in (1, -1)
    )
    return float(min(upper + lower, count * span))
