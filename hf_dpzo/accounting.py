"""What one release of data costs, and how much noise a budget asks for.

A `Query` states the facts of one kind of release; Google's dp-accounting turns them into an epsilon. Two accountants
are asked, privacy loss distributions (PLD) and Rényi DP. Both give upper bounds, so the smaller one is reported.
Neighbouring data sets differ by adding or removing one unit.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import dp_accounting
from dp_accounting import mechanism_calibration
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant


NEIGHBORING_RELATION = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
# Below this multiplier a PLD needs minutes and gigabytes (8.7 s at 0.1), below this delta it answers infinity.
SMALLEST_PLD_NOISE, SMALLEST_PLD_DELTA = 0.2, 1e-12
# A coarse grid is still an upper bound, only a wasteful one: measured, by up to some 30 * steps * grid**2.
COARSE, FINE = 1e-3, 1e-4

# The Rényi accountant warns for each order that it leaves out; the orders that remain still give an upper bound.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class GaussianQuery:
    """One release of a sum with Gaussian noise, over a batch that each unit joins independently.

    Args:
        noise_multiplier: the noise's standard deviation over the L2 sensitivity of the sum.
        sampling_rate: the probability with which each unit joins the batch; 1 for all of the data.

    The discrete Gaussian on a lattice of 2**40 steps is accounted as the continuous one: it satisfies the same zCDP,
    and the densities differ by a relative 1e-25.
    """

    noise_multiplier: float
    sampling_rate: float

    def __post_init__(self) -> None:
        # dp-accounting 0.6.0 silently under-reports some events whose multiplier is an int or a float32, and calls a
        # NaN multiplier epsilon = 0. Remove the conversion when its constructors validate.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sampling_rate", float(self.sampling_rate))
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier={self.noise_multiplier}: it must be positive and finite.")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate={self.sampling_rate}: it must lie in (0, 1].")

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The release as dp-accounting describes it."""
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate == 1:
            return gaussian
        return dp_accounting.PoissonSampledDpEvent(self.sampling_rate, gaussian)


@dataclass(frozen=True, kw_only=True)
class NonPrivateQuery:
    """One release without noise: no epsilon describes it."""

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The release as dp-accounting describes it."""
        return dp_accounting.NonPrivateDpEvent()


Query = GaussianQuery | NonPrivateQuery
Releases = tuple[tuple[Query, int], ...]


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """Upper bounds on epsilon at one delta, for a sequence of releases. `None` where an accountant does not apply.

    >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01)
    >>> round(guarantee(((query, 1000),), delta=1e-5).epsilon, 3)
    1.828
    """

    delta: float
    rdp: float
    pld: float | None

    @property
    def epsilon(self) -> float:
        """The smaller bound."""
        return self.rdp if self.pld is None else min(self.rdp, self.pld)


def check_delta(delta: float) -> float:
    """Return `delta`, or raise: the accountants take any number without complaint."""
    if not 0 < delta < 1:
        raise ValueError(f"target_delta={delta}: delta lies between 0 and 1, well below one over the number of rows.")
    return float(delta)


@lru_cache(maxsize=4096)
def guarantee(releases: Releases, *, delta: float) -> Guarantee:
    """Account for `releases`, pairs of a query and how often it ran, at `delta`."""
    check_delta(delta)
    if not releases:
        return Guarantee(delta=delta, rdp=0.0, pld=0.0)
    if any(isinstance(query, NonPrivateQuery) for query, _ in releases):
        return Guarantee(delta=delta, rdp=math.inf, pld=math.inf)
    pld = _pld_epsilon(releases, delta) if _suits_pld(releases, delta) else None
    return Guarantee(delta=delta, rdp=_rdp_epsilon(releases, delta), pld=pld)


def membership_accuracy(releases: Releases, *, delta: float) -> float:
    """How often the best possible guess whether one row was used is right, from even odds: an upper bound.

    It is `(1 + TV) / 2`, with the total variation distance between the outputs on neighbouring data sets, read off the
    privacy loss distribution where there is one and bounded by epsilon and delta otherwise.

    >>> round(membership_accuracy(((GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1),), delta=1e-5), 3)
    0.691
    """
    if not releases:
        return 0.5
    epsilon = guarantee(releases, delta=delta).epsilon
    if math.isinf(epsilon):
        return 1.0
    bounds = [(math.exp(epsilon) + delta) / (1 + math.exp(epsilon))] if epsilon < 700 else [1.0]
    if _suits_pld(releases, delta):
        grids = _grids(_steps(releases), epsilon)
        bounds += [(1 + float(_pld(releases, grid).get_delta(0.0))) / 2 for grid in grids]
    return min(bounds)


def calibrate(query: GaussianQuery, *, steps: int, target_epsilon: float, target_delta: float) -> GaussianQuery:
    """Return `query` with the least noise multiplier that keeps `steps` releases within the target.

    The Rényi accountant finds a safe multiplier first; PLD then tightens it inside a bracket, since it can not be let
    loose on tiny multipliers.

    >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.016)
    >>> round(calibrate(query, steps=1000, target_epsilon=2.0, target_delta=1e-5).noise_multiplier, 3)
    1.263
    """
    check_delta(target_delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"target_epsilon={target_epsilon}: it must be positive and finite.")
    if steps < 1:
        raise ValueError(f"steps={steps}: there must be at least one step to calibrate the noise for.")

    def releases(noise_multiplier: float) -> Releases:
        return ((replace(query, noise_multiplier=noise_multiplier), steps),)

    try:
        safe = dp_accounting.calibrate_dp_mechanism(
            lambda: RdpAccountant(neighboring_relation=NEIGHBORING_RELATION),
            lambda noise_multiplier: _composed(releases(noise_multiplier)),
            target_epsilon,
            target_delta,
            bracket_interval=dp_accounting.LowerEndpointAndGuess(0.05, 1.0),
        )
    except mechanism_calibration.NoBracketIntervalFoundError:
        raise ValueError(
            f"target_epsilon={target_epsilon:g}: no noise multiplier of 0.05 or more gives it; choose another."
        ) from None
    candidates = [safe]
    for grid in _grids(steps, target_epsilon):
        candidates.append(_tighten(releases, candidates[-1], grid, target_epsilon, target_delta))
    met = (one for one in reversed(candidates) if _epsilon(releases(one), target_delta) <= target_epsilon)
    return replace(query, noise_multiplier=next(met))


def _epsilon(releases: Releases, delta: float) -> float:
    return guarantee(releases, delta=delta).epsilon


def _tighten(releases, best: float, grid: float, target_epsilon: float, target_delta: float) -> float:
    """Lower the noise multiplier `best` as far as PLD on `grid` allows."""

    def excess(noise_multiplier: float) -> float:
        return _pld(releases(noise_multiplier), grid).get_epsilon(target_delta) - target_epsilon

    low = max(0.5 * best, SMALLEST_PLD_NOISE)
    if low >= best or target_delta < SMALLEST_PLD_DELTA or excess(best) > 0:
        return best
    if excess(low) <= 0:
        return low
    tightened = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(NEIGHBORING_RELATION, grid),
        lambda noise_multiplier: _composed(releases(noise_multiplier)),
        target_epsilon,
        target_delta,
        bracket_interval=dp_accounting.ExplicitBracketInterval(low, best),
        tol=1e-4 * best,
    )
    return min(best, tightened)


def _composed(releases: Sequence[tuple[Query, int]]) -> dp_accounting.DpEvent:
    repeated = [dp_accounting.SelfComposedDpEvent(query.event, int(count)) for query, count in releases]
    return repeated[0] if len(repeated) == 1 else dp_accounting.ComposedDpEvent(repeated)


def _suits_pld(releases: Releases, delta: float) -> bool:
    return delta >= SMALLEST_PLD_DELTA and all(query.noise_multiplier >= SMALLEST_PLD_NOISE for query, _ in releases)


def _rdp_epsilon(releases: Releases, delta: float) -> float:
    accountant = RdpAccountant(neighboring_relation=NEIGHBORING_RELATION)
    return float(accountant.compose(_composed(releases)).get_epsilon(delta))


@lru_cache(maxsize=8)
def _pld(releases: Releases, grid: float) -> PLDAccountant:
    return PLDAccountant(NEIGHBORING_RELATION, grid).compose(_composed(releases))


def _pld_epsilon(releases: Releases, delta: float) -> float:
    epsilon = float(_pld(releases, COARSE).get_epsilon(delta))
    if FINE in _grids(_steps(releases), epsilon):
        epsilon = min(epsilon, float(_pld(releases, FINE).get_epsilon(delta)))
    return epsilon


def _steps(releases: Releases) -> int:
    return sum(count for _, count in releases)


def _grids(steps: int, epsilon: float) -> tuple[float, ...]:
    """The grids to ask: the fine one, ten times slower, only where it could lower epsilon by a hundredth."""
    return (COARSE,) if 30 * steps * COARSE**2 < 0.01 * epsilon else (COARSE, FINE)
