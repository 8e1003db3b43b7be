"""The least noise with which a run stays within its target epsilon."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import TypeVar

import dp_accounting
from dp_accounting.rdp import RdpAccountant
from scipy import optimize

from hf_dpzo.io.figures import show_figures
from hf_dpzo.privacy.accounting import (
    COARSE_GRID,
    MIN_PLD_DELTA,
    NEIGHBORING_RELATION,
    account,
    build_pld_accountant,
    check_delta,
    choose_grids,
    compose_events,
)
from hf_dpzo.privacy.cost import PointLimit
from hf_dpzo.privacy.dense import read_epsilon
from hf_dpzo.privacy.queries import MAX_NOISE_MULTIPLIER, GaussianQuery, LaplaceQuery, Releases
from hf_dpzo.privacy.quiet import kept_logging


# Less noise than this gives no privacy, and the accountants take long to find that out.
MIN_NOISE_MULTIPLIER = 0.05


# A search builds about a dozen distributions, so each may take a third of what one may.
SEARCH_LIMIT = PointLimit(single=200_000, composed=700_000)


Q = TypeVar("Q", GaussianQuery, LaplaceQuery)


@lru_cache(maxsize=64)
@kept_logging()
def calibrate_query(query: Q, *, steps: int, target_epsilon: float, target_delta: float, earlier: Releases = ()) -> Q:
    """Return `query` with the least noise multiplier that keeps `steps` releases within the target.

    For Gaussian noise, the Rényi accountant first finds a safe multiplier. PLD then lowers it inside a bracket, because
    it would take minutes and gigabytes on tiny multipliers. For Laplace noise, the target is a pure epsilon, at delta
    0, and the multiplier follows from a closed form.

    Args:
        query: the release of one step. Its own noise multiplier does not matter.
        steps: the number of steps of the whole run.
        target_epsilon: the largest epsilon allowed.
        target_delta: the delta of the target, for Gaussian noise.
        earlier: Gaussian releases that were made before, and that the target covers too.

    Guarantee: `account` gives the returned query, `steps` times, after the `earlier` releases an epsilon of at most
    the target.

    Raises:
        ValueError: a number makes no sense, or no noise multiplier in range meets the target closely.

    >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.016)
    >>> round(calibrate_query(query, steps=1000, target_epsilon=2.0, target_delta=1e-5).noise_multiplier, 3)
    1.263
    """
    check_delta(target_delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"target_epsilon={target_epsilon}: it must be positive and finite.")
    if steps < 1:
        raise ValueError(f"steps={steps}: there must be at least one step to calibrate the noise for.")
    if earlier:
        _refuse_earlier(query, earlier, target_epsilon, target_delta)
    if isinstance(query, LaplaceQuery):
        return _calibrate_laplace(query, steps, target_epsilon)

    def build_releases(noise_multiplier: float) -> Releases:
        return ((replace(query, noise_multiplier=noise_multiplier), steps), *earlier)

    accountant = RdpAccountant(neighboring_relation=NEIGHBORING_RELATION)
    accountant.compose(compose_events(build_releases(MIN_NOISE_MULTIPLIER)))
    if accountant.get_epsilon(target_delta) <= target_epsilon:
        raise ValueError(
            f"target_epsilon={target_epsilon:g}: a noise multiplier of {MIN_NOISE_MULTIPLIER} gives less; lower it."
        )
    safe = dp_accounting.calibrate_dp_mechanism(
        lambda: RdpAccountant(neighboring_relation=NEIGHBORING_RELATION),
        lambda noise_multiplier: compose_events(build_releases(noise_multiplier)),
        target_epsilon,
        target_delta,
        bracket_interval=dp_accounting.LowerEndpointAndGuess(MIN_NOISE_MULTIPLIER, 1.0),
    )
    candidates = [safe]
    for grid in choose_grids(build_releases(safe), target_epsilon, limit=SEARCH_LIMIT):
        candidates.append(_tighten(build_releases, candidates[-1], grid, target_epsilon, target_delta))
    sufficient = (
        noise_multiplier
        for noise_multiplier in reversed(candidates)
        if account(build_releases(noise_multiplier), delta=target_delta).epsilon <= target_epsilon
    )
    return replace(query, noise_multiplier=next(sufficient))


def _refuse_earlier(query: Q, earlier: Releases, target_epsilon: float, target_delta: float) -> None:
    """Raise `ValueError` if no noise keeps `query` after `earlier` within the target, or none can be computed."""
    if not all(isinstance(one, GaussianQuery) for one in (query, *(release[0] for release in earlier))):
        raise ValueError(
            f"target_epsilon={target_epsilon:g}: with Laplace noise in earlier runs or in this one it can not be "
            "computed; set noise_multiplier instead."
        )
    spent = account(earlier, delta=target_delta).epsilon
    if spent >= target_epsilon:
        raise ValueError(
            f"target_epsilon={target_epsilon:g}: earlier runs have spent {show_figures(spent, 3)} of it; raise it."
        )


def _calibrate_laplace(query: LaplaceQuery, steps: int, target_epsilon: float) -> LaplaceQuery:
    """Invert `pure_epsilon`, then raise the multiplier until float64 agrees that the target is met."""
    step_epsilon = target_epsilon / steps
    q = query.sampling_rate
    if step_epsilon < 1:
        loss = math.log1p(math.expm1(step_epsilon) / q)
    else:  # The same, written so that exp cannot overflow.
        loss = step_epsilon + math.log((1 - (1 - q) * math.exp(-step_epsilon)) / q)
    if loss < 1 / MAX_NOISE_MULTIPLIER:
        raise ValueError(
            f"target_epsilon={target_epsilon:g}: no noise multiplier below {MAX_NOISE_MULTIPLIER} gives it; raise it."
        )
    noise_multiplier = 1 / loss
    while replace(query, noise_multiplier=noise_multiplier).pure_epsilon(steps) > target_epsilon:
        noise_multiplier *= 1 + 2.0**-40
    return replace(query, noise_multiplier=noise_multiplier)


def _tighten(
    build_releases: Callable[[float], Releases], best: float, grid: float, target_epsilon: float, target_delta: float
) -> float:
    """Lower the noise multiplier `best` as far as PLD on `grid` allows."""

    @cache
    def excess(noise_multiplier: float) -> float:
        accountant = build_pld_accountant(build_releases(noise_multiplier), grid)
        return read_epsilon(accountant, target_delta) - target_epsilon

    lowest = GaussianQuery.min_pld_noise
    if lowest >= best or target_delta < MIN_PLD_DELTA or excess(best) > 0:
        return best
    # A finer grid lowers the multiplier by little, so a narrow bracket is tried first.
    for low in (0.98 * best, 0.5 * best) if grid < COARSE_GRID else (0.5 * best,):
        low = max(low, lowest)
        if excess(low) > 0:
            break
    else:
        return low
    return _find_smallest(excess, low, best)


def _find_smallest(excess: Callable[[float], float], low: float, high: float) -> float:
    """Return the least multiplier without excess, up to 1e-4 of `high`; `low` has an excess, and `high` has none."""
    tolerance = 1e-4 * high
    root = float(optimize.brentq(excess, low, high, xtol=tolerance / 2))
    candidates = (root, min(root + tolerance, high), high)
    return next(noise_multiplier for noise_multiplier in candidates if excess(noise_multiplier) <= 0)
