"""How much noise a budget asks for."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import TypeVar

import dp_accounting
from dp_accounting.rdp import RdpAccountant
from scipy import optimize

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
from hf_dpzo.privacy.queries import MAX_NOISE_MULTIPLIER, GaussianQuery, LaplaceQuery, Releases


# Less noise than this is no privacy, and takes the accountants long to say so.
MIN_NOISE_MULTIPLIER = 0.05


Q = TypeVar("Q", GaussianQuery, LaplaceQuery)


@lru_cache(maxsize=64)
def calibrate_query(query: Q, *, steps: int, target_epsilon: float, target_delta: float) -> Q:
    """Return `query` with the least noise multiplier that keeps `steps` releases within the target.

    For Gaussian noise the Rényi accountant finds a safe multiplier first; PLD then tightens it inside a bracket, since
    it can not be let loose on tiny multipliers. For Laplace noise the target is a pure epsilon, with delta 0, and the
    multiplier follows by a closed form.

    >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.016)
    >>> round(calibrate_query(query, steps=1000, target_epsilon=2.0, target_delta=1e-5).noise_multiplier, 3)
    1.263
    """
    check_delta(target_delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"target_epsilon={target_epsilon}: it must be positive and finite.")
    if steps < 1:
        raise ValueError(f"steps={steps}: there must be at least one step to calibrate the noise for.")
    if isinstance(query, LaplaceQuery):
        return _calibrate_laplace(query, steps, target_epsilon)

    def releases(noise_multiplier: float) -> Releases:
        return ((replace(query, noise_multiplier=noise_multiplier), steps),)

    smallest = RdpAccountant(neighboring_relation=NEIGHBORING_RELATION).compose(
        compose_events(releases(MIN_NOISE_MULTIPLIER))
    )
    if smallest.get_epsilon(target_delta) <= target_epsilon:
        raise ValueError(
            f"target_epsilon={target_epsilon:g}: a noise multiplier of {MIN_NOISE_MULTIPLIER} gives less; lower it."
        )
    safe = dp_accounting.calibrate_dp_mechanism(
        lambda: RdpAccountant(neighboring_relation=NEIGHBORING_RELATION),
        lambda noise_multiplier: compose_events(releases(noise_multiplier)),
        target_epsilon,
        target_delta,
        bracket_interval=dp_accounting.LowerEndpointAndGuess(MIN_NOISE_MULTIPLIER, 1.0),
    )
    candidates = [safe]
    for grid in choose_grids(steps, target_epsilon):
        candidates.append(_tighten(releases, candidates[-1], grid, target_epsilon, target_delta))
    met = (one for one in reversed(candidates) if _epsilon(releases(one), target_delta) <= target_epsilon)
    return replace(query, noise_multiplier=next(met))


def _calibrate_laplace(query: LaplaceQuery, steps: int, target_epsilon: float) -> LaplaceQuery:
    """Invert `pure_epsilon`, and round up until float64 agrees that the target is met."""
    per_step, q = target_epsilon / steps, query.sampling_rate
    if per_step < 1:
        loss = math.log1p(math.expm1(per_step) / q)
    else:
        loss = per_step + math.log((1 - (1 - q) * math.exp(-per_step)) / q)  # The same, where exp(per_step) overflows.
    if loss < 1 / MAX_NOISE_MULTIPLIER:
        raise ValueError(
            f"target_epsilon={target_epsilon:g}: no noise multiplier below {MAX_NOISE_MULTIPLIER} gives it; raise it."
        )
    noise_multiplier = 1 / loss
    while replace(query, noise_multiplier=noise_multiplier).pure_epsilon(steps) > target_epsilon:
        noise_multiplier *= 1 + 2.0**-40
    return replace(query, noise_multiplier=noise_multiplier)


def _epsilon(releases: Releases, delta: float) -> float:
    return account(releases, delta=delta).epsilon


def _tighten(releases, best: float, grid: float, target_epsilon: float, target_delta: float) -> float:
    """Lower the noise multiplier `best` as far as PLD on `grid` allows."""

    @cache
    def excess(noise_multiplier: float) -> float:
        return build_pld_accountant(releases(noise_multiplier), grid).get_epsilon(target_delta) - target_epsilon

    lowest = GaussianQuery.min_pld_noise
    if lowest >= best or target_delta < MIN_PLD_DELTA or excess(best) > 0:
        return best
    # A finer grid lowers it by little.
    for low in (0.98 * best, 0.5 * best) if grid != COARSE_GRID else (0.5 * best,):
        low = max(low, lowest)
        if excess(low) > 0:
            break
    else:
        return low
    return _find_smallest(excess, low, best)


def _find_smallest(excess: Callable[[float], float], low: float, high: float) -> float:
    """Between one that exceeds the target and one that does not, by less than 1e-4 of `high`."""
    tolerance = 1e-4 * high
    found = float(optimize.brentq(excess, low, high, xtol=tolerance / 2))
    return next(one for one in (found, min(found + tolerance, high), high) if excess(one) <= 0)
