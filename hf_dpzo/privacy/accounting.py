"""What releases of data cost together.

Google's dp-accounting turns the facts of releases, `Query`, into an epsilon. Two accountants are asked, privacy loss
distributions (PLD) and Rényi DP. Laplace noise also gives pure epsilon, with delta 0, by a closed form. All are upper
bounds, so the smallest one is reported. Neighbouring data sets differ by adding or removing one unit.
"""

import logging
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery, Releases


NEIGHBORING_RELATION = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


# With more, anything may be e**1000 times as likely.
MAX_EPSILON = 1000.0


# Below this delta a PLD answers infinity.
MIN_PLD_DELTA = 1e-12


# A coarse grid is still an upper bound, only a wasteful one: measured, by up to some 30 * steps * grid**2.
COARSE_GRID, FINE_GRID = 1e-3, 1e-4


# Groups cost many times as much time, and their epsilon, which is large, needs no finer one.
GROUP_GRID, MAX_GROUP_SIZE = 1e-2, 64


# The Rényi accountant warns for each order that it leaves out; the orders that remain still give an upper bound.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """Upper bounds on the epsilon of a sequence of releases, at one delta. `None` where an accountant does not apply.

    Args:
        delta: the delta at which `rdp` and `pld` hold.
        rdp: the bound of Rényi differential privacy.
        pld: the bound of privacy loss distributions.
        pure: an epsilon that holds at delta 0, which Laplace noise has.

    >>> Guarantee(delta=1e-5, rdp=2.093, pld=1.828).epsilon
    1.828
    """

    delta: float
    rdp: float | None
    pld: float | None
    pure: float | None = None

    @property
    def epsilon(self) -> float:
        """The smallest bound. The pure one, where there is one, holds at every delta."""
        return min((bound for bound in (self.rdp, self.pld, self.pure) if bound is not None), default=math.inf)


def check_delta(delta: float, *, num_rows: int | None = None) -> float:
    """Return `delta`, or raise: the accountants take any number without complaint."""
    if not 0 < delta < 1:
        raise ValueError(f"target_delta={delta}: delta lies between 0 and 1, well below one over the number of rows.")
    if num_rows is not None and delta >= 1 / num_rows:
        raise ValueError(
            f"target_delta={delta}: with {num_rows} rows it would allow one to be published whole; "
            f"choose at most {0.1 / num_rows:.0e}."
        )
    return float(delta)


def check_epsilon(spent: Guarantee) -> None:
    """Raise where epsilon is so large that it promises nothing."""
    if spent.epsilon > MAX_EPSILON:
        raise ValueError(
            f"epsilon={spent.epsilon:.3g}: more than {MAX_EPSILON:g} promises nothing; lower target_epsilon, or "
            "raise noise_multiplier."
        )


@lru_cache(maxsize=4096)
def account(releases: Releases, *, delta: float) -> Guarantee:
    """Account for `releases`, pairs of a query and how often it ran, at `delta`.

    >>> query = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01)
    >>> round(account(((query, 1000),), delta=1e-5).epsilon, 3)
    1.828
    """
    check_delta(delta)
    if not releases:
        return Guarantee(delta=delta, rdp=0.0, pld=0.0)
    if any(isinstance(query, NonPrivateQuery) for query, _ in releases):
        return Guarantee(delta=delta, rdp=math.inf, pld=math.inf)
    rdp = _rdp_epsilon(releases, delta) if _rdp_applies(releases) else None
    pure = _pure_epsilon(releases)
    # A distribution of larger losses would take minutes and gigabytes, most often to find a promise that is none.
    quick = rdp if pure is None else pure
    answers = pld_applies(releases, delta) and (quick is None or quick <= 5 * MAX_EPSILON)
    return Guarantee(delta=delta, rdp=rdp, pld=_pld_epsilon(releases, delta) if answers else None, pure=pure)


@lru_cache(maxsize=256)
def replace_one_epsilon(releases: Releases, *, delta: float) -> float:
    """Return epsilon at `delta` for neighbours of which one row was replaced by another, instead of added or removed.

    For releases with Gaussian noise. The difference of two rows may be twice as long as one row. Only PLD is asked:
    dp-accounting 0.6.0 doubles the sensitivity there, and not in its Rényi accountant.

    >>> release = (GaussianQuery(noise_multiplier=2.0, sampling_rate=1.0), 1)
    >>> half = (GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1)
    >>> added = account((half,), delta=1e-5).epsilon
    >>> bool(abs(replace_one_epsilon((release,), delta=1e-5) - added) < 1e-2)
    True
    """
    if not (pld_applies(releases, delta) and all(isinstance(query, GaussianQuery) for query, _ in releases)):
        return math.inf
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    return float(PLDAccountant(relation, COARSE_GRID).compose(compose_events(releases)).get_epsilon(delta))


@lru_cache(maxsize=256)
def account_for_group(releases: Releases, *, size: int, delta: float) -> float:
    """Return epsilon at `delta` for neighbours that differ in up to `size` units, such as all the rows of one person.

    Each of them joins a batch by itself, so their part in a sum has a binomial number of sensitivities, at most (Ganesh
    2024). At one delta it may be more than `size` times epsilon. Infinite where it is not known.

    >>> release = (GaussianQuery(noise_multiplier=2.0, sampling_rate=1.0), 1)
    >>> single = (GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1)
    >>> one = account((single,), delta=1e-5).epsilon
    >>> bool(abs(account_for_group((release,), size=2, delta=1e-5) - one) < 1e-2)
    True
    """
    pure = _pure_epsilon(releases)
    if pure is not None:
        return size * pure
    if not pld_applies(releases, delta) or any(isinstance(query, LaplaceQuery) for query, _ in releases):
        return math.inf
    guess = size * account(releases, delta=delta).epsilon
    grid = min(GROUP_GRID, max(COARSE_GRID, math.sqrt(0.002 * guess / count_releases(releases))))
    accountant = PLDAccountant(NEIGHBORING_RELATION, grid)
    for query, count in releases:
        accountant.compose(_build_group_event(query, size), count)
    return float(accountant.get_epsilon(delta))


def _build_group_event(query: GaussianQuery, size: int) -> dp_event.MixtureOfGaussiansDpEvent:
    """A release, for neighbours that differ in `size` units."""
    q = query.sampling_rate
    shares = {k: math.comb(size, k) * q**k * (1 - q) ** (size - k) for k in range(size + 1)}
    present = {float(k): share for k, share in shares.items() if share > 0}
    return dp_event.MixtureOfGaussiansDpEvent(query.noise_multiplier, list(present), list(present.values()))


def compose_events(releases: Releases) -> dp_accounting.DpEvent:
    """Return all of `releases` as one event."""
    repeated = [dp_accounting.SelfComposedDpEvent(query.event, int(count)) for query, count in releases]
    return repeated[0] if len(repeated) == 1 else dp_accounting.ComposedDpEvent(repeated)


def event_tree(releases: Releases) -> dict[str, Any]:
    """Return all of `releases` as JSON: dp-accounting's event, by the names of its classes and their fields.

    >>> event_tree(((GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 3),))["class_name"]
    'SelfComposedDpEvent'
    """
    return _as_tree(compose_events(releases).to_named_tuple())


def _as_tree(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_tree(one) for one in value]
    if not isinstance(value, tuple):
        return value
    return {name: _as_tree(one) for name, one in value._asdict().items() if name != "module_name"}


def pld_applies(releases: Releases, delta: float) -> bool:
    """Whether privacy loss distributions answer for `releases` at `delta`, within seconds."""
    return delta >= MIN_PLD_DELTA and all(query.noise_multiplier >= query.min_pld_noise for query, _ in releases)


def _rdp_applies(releases: Releases) -> bool:
    """The Rényi accountant knows no Laplace noise under sampling."""
    return all(isinstance(query, GaussianQuery) or query.sampling_rate == 1 for query, _ in releases)


def _pure_epsilon(releases: Releases) -> float | None:
    if not all(isinstance(query, LaplaceQuery) for query, _ in releases):
        return None
    return sum(query.pure_epsilon(count) for query, count in releases)


def _rdp_epsilon(releases: Releases, delta: float) -> float:
    return float(_build_rdp_accountant(releases).get_epsilon(delta))


@lru_cache(maxsize=8)
def _build_rdp_accountant(releases: Releases) -> RdpAccountant:
    """Return the Rényi divergences of `releases`, which take long and answer for every delta."""
    return RdpAccountant(neighboring_relation=NEIGHBORING_RELATION).compose(compose_events(releases))


@lru_cache(maxsize=8)
def build_pld_accountant(releases: Releases, grid: float) -> PLDAccountant:
    """Return the privacy loss distribution of `releases` on a grid of that width."""
    return PLDAccountant(NEIGHBORING_RELATION, grid).compose(compose_events(releases))


def _pld_epsilon(releases: Releases, delta: float) -> float:
    epsilon = float(build_pld_accountant(releases, COARSE_GRID).get_epsilon(delta))
    if FINE_GRID in choose_grids(count_releases(releases), epsilon):
        epsilon = min(epsilon, float(build_pld_accountant(releases, FINE_GRID).get_epsilon(delta)))
    return epsilon


def count_releases(releases: Releases) -> int:
    """How many releases there are."""
    return sum(count for _, count in releases)


def choose_grids(steps: int, epsilon: float) -> tuple[float, ...]:
    """The grids to ask: the fine one, ten times slower, only where it could lower epsilon by a hundredth."""
    return (COARSE_GRID,) if 30 * steps * COARSE_GRID**2 < 0.01 * epsilon else (COARSE_GRID, FINE_GRID)
