"""The privacy cost of a sequence of releases.

Google's dp-accounting turns the facts of each release, a `Query`, into an epsilon. Two of its accountants are asked:
privacy loss distributions (PLD) and Rényi DP (RDP). Laplace noise also has a pure epsilon, at delta 0, by a closed
form. All are upper bounds, so the smallest is reported. Neighbouring data sets differ by one unit, added or removed.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from hf_dpzo.io.figures import show_figures
from hf_dpzo.io.html import format_html_table
from hf_dpzo.privacy.cost import PointLimit, predict_width
from hf_dpzo.privacy.dense import dense_composition, read_epsilon
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery, Query, Releases, count_releases
from hf_dpzo.privacy.quiet import kept_logging
from hf_dpzo.privacy.rounding import round_up


NEIGHBORING_RELATION = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


# Beyond this, one unit may make an outcome more than e**1000 times as likely: a promise of nothing.
MAX_EPSILON = 1000.0


# Below this delta the PLD accountant answers infinity.
MIN_PLD_DELTA = 1e-12


# The widths of the grids on which a PLD discretizes the privacy loss. A coarse grid still gives an upper bound, only a
# looser one: in measurements, by up to about 30 * steps * grid**2.
COARSE_GRID, FINE_GRID = 1e-3, 1e-4


# A group takes many times as long to account for, and its large epsilon needs no finer grid.
GROUP_GRID = 1e-2


# A PLD within these limits takes a few seconds and a few hundred megabytes. The plans of real runs are far within; for
# others the grid is coarser.
LIMIT, GROUP_LIMIT = PointLimit(single=600_000, composed=2_000_000), PointLimit(single=80_000, composed=1_000_000)


# The largest number of units in a group.
MAX_GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """Upper bounds on the epsilon of a sequence of releases, at one delta. `None` where an accountant does not apply.

    Args:
        delta: the delta at which `rdp` and `pld` hold.
        rdp: the epsilon from Rényi differential privacy.
        pld: the epsilon from privacy loss distributions.
        pure: the epsilon at delta 0, which only Laplace noise has.

    >>> Guarantee(delta=1e-5, rdp=2.093, pld=1.828).epsilon
    1.828
    """

    delta: float
    rdp: float | None
    pld: float | None
    pure: float | None = None

    @property
    def epsilon(self) -> float:
        """The smallest of the bounds, infinite without any. A pure epsilon holds at every delta."""
        return min((bound for bound in (self.rdp, self.pld, self.pure) if bound is not None), default=math.inf)

    def _repr_html_(self) -> str:
        bounds = {"epsilon": self.epsilon, "by PLD": self.pld, "by Rényi DP": self.rdp, "pure": self.pure}
        rows = [(name, f"{round_up(bound):g}") for name, bound in bounds.items() if bound is not None]
        return format_html_table([*rows, ("delta", f"{self.delta:g}")], caption="Guarantee")


def check_delta(delta: float, *, num_rows: int | None = None) -> float:
    """Return `delta`, or raise `ValueError` where it promises nothing: the accountants accept any number.

    Args:
        delta: the delta to check.
        num_rows: the number of rows of training data, where it is known.
    """
    if not 0 < delta < 1:
        raise ValueError(f"target_delta={delta}: delta lies between 0 and 1, well below one over the number of rows.")
    if num_rows is not None and delta >= 1 / num_rows:
        raise ValueError(
            f"target_delta={delta}: with {num_rows} rows it would allow one to be published whole; "
            f"choose at most {0.1 / num_rows:.0e}."
        )
    return float(delta)


def check_epsilon(spent: Guarantee) -> None:
    """Raise `ValueError` where the epsilon of `spent` is so large that it promises nothing."""
    if spent.epsilon > MAX_EPSILON:
        raise ValueError(
            f"epsilon={show_figures(spent.epsilon, 3)}: more than {MAX_EPSILON:g} promises nothing; lower "
            "target_epsilon, or raise noise_multiplier."
        )


@lru_cache(maxsize=4096)
def account(releases: Releases, *, delta: float) -> Guarantee:
    """Return upper bounds on the epsilon of `releases` at `delta`.

    Args:
        releases: pairs of a query and the number of times it ran.
        delta: the delta at which epsilon is stated.

    Guarantee: the releases together are (`epsilon`, `delta`)-differentially private for adding or removing one unit,
    even where what a release sums up depends on those before it.

    Raises:
        ValueError: `delta` is not between 0 and 1.

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
    # A PLD of larger losses would take minutes and gigabytes, mostly to find an epsilon that promises nothing.
    quick_bound = rdp if pure is None else pure
    is_pld_worthwhile = pld_applies(releases, delta) and (quick_bound is None or quick_bound <= 5 * MAX_EPSILON)
    return Guarantee(delta=delta, rdp=rdp, pld=_pld_epsilon(releases, delta) if is_pld_worthwhile else None, pure=pure)


@lru_cache(maxsize=256)
def replace_one_epsilon(releases: Releases, *, delta: float) -> float:
    """Return epsilon at `delta` for neighbours that differ by one row replaced with another, not added or removed.

    The difference of two rows may be twice as long as one row. Only PLD is asked, because dp-accounting 0.6.0 doubles
    the sensitivity in PLD but not in its Rényi accountant. Infinite unless all noise is Gaussian and PLD applies.

    >>> release = (GaussianQuery(noise_multiplier=2.0, sampling_rate=1.0), 1)
    >>> half = (GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1)
    >>> added = account((half,), delta=1e-5).epsilon
    >>> bool(abs(replace_one_epsilon((release,), delta=1e-5) - added) < 1e-2)
    True
    """
    if not (pld_applies(releases, delta) and all(isinstance(query, GaussianQuery) for query, _ in releases)):
        return math.inf
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    grid = predict_width(releases, sensitivity=2.0).choose_grid(COARSE_GRID, LIMIT)
    with dense_composition():
        accountant = PLDAccountant(relation, grid).compose(compose_events(releases))
    return read_epsilon(accountant, delta)


@lru_cache(maxsize=256)
def account_for_group(releases: Releases, *, size: int, delta: float) -> float:
    """Return epsilon at `delta` for neighbours that differ by up to `size` units, such as all the rows of one person.

    Each unit joins a batch independently, so the group moves a sum by at most a binomial number of sensitivities
    (Ganesh 2024). At one delta, epsilon may be more than `size` times that of one unit. Infinite where no bound is
    known.

    >>> release = (GaussianQuery(noise_multiplier=2.0, sampling_rate=1.0), 1)
    >>> half = (GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 1)
    >>> expected = account((half,), delta=1e-5).epsilon
    >>> bool(abs(account_for_group((release,), size=2, delta=1e-5) - expected) < 1e-2)
    True
    """
    pure = _pure_epsilon(releases)
    if pure is not None:
        return size * pure
    accountant = build_group_accountant(releases, size=size, delta=delta)
    return math.inf if accountant is None else read_epsilon(accountant, delta)


@lru_cache(maxsize=16)
def build_group_accountant(releases: Releases, *, size: int, delta: float) -> PLDAccountant | None:
    """Return the accountant that `account_for_group` asks; `None` unless all noise is Gaussian and PLD applies."""
    if not pld_applies(releases, delta) or any(isinstance(query, LaplaceQuery) for query, _ in releases):
        return None
    guess = size * account(releases, delta=delta).epsilon
    wanted = min(GROUP_GRID, max(COARSE_GRID, math.sqrt(0.002 * guess / count_releases(releases))))
    grid = predict_width(releases, size=size).choose_grid(wanted, GROUP_LIMIT)
    accountant = PLDAccountant(NEIGHBORING_RELATION, grid)
    with dense_composition():
        for query, count in releases:
            accountant.compose(_build_group_event(query, size), count)
    return accountant


def _build_group_event(query: GaussianQuery, size: int) -> dp_event.MixtureOfGaussiansDpEvent:
    """Return one release as an event for neighbours that differ by `size` units."""
    q = query.sampling_rate
    shares = {k: math.comb(size, k) * q**k * (1 - q) ** (size - k) for k in range(size + 1)}
    present = {float(k): share for k, share in shares.items() if share > 0}
    return dp_event.MixtureOfGaussiansDpEvent(query.noise_multiplier, list(present), list(present.values()))


def compose_events(releases: Releases) -> dp_accounting.DpEvent:
    """Return all of `releases` as one event of dp-accounting."""
    repeated = [dp_accounting.SelfComposedDpEvent(query.event, int(count)) for query, count in releases]
    return repeated[0] if len(repeated) == 1 else dp_accounting.ComposedDpEvent(repeated)


def event_tree(releases: Releases) -> dict[str, Any]:
    """Return all of `releases` as JSON: the event of dp-accounting, by the names of its classes and their fields.

    >>> event_tree(((GaussianQuery(noise_multiplier=1.0, sampling_rate=1.0), 3),))["class_name"]
    'SelfComposedDpEvent'
    """
    return _as_tree(compose_events(releases).to_named_tuple())


def _as_tree(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_tree(item) for item in value]
    if not isinstance(value, tuple):
        return value
    return {name: _as_tree(field) for name, field in value._asdict().items() if name != "module_name"}


def pld_applies(releases: Releases, delta: float) -> bool:
    """Return whether privacy loss distributions give a bound for `releases` at `delta` within seconds."""
    return delta >= MIN_PLD_DELTA and all(query.noise_multiplier >= query.min_pld_noise for query, _ in releases)


def _rdp_applies(releases: Releases) -> bool:
    """Return whether the Rényi accountant gives a bound, which it does not for Laplace noise under sampling."""
    return all(isinstance(query, GaussianQuery) or query.sampling_rate == 1 for query, _ in releases)


def _pure_epsilon(releases: Releases) -> float | None:
    if not all(isinstance(query, LaplaceQuery) for query, _ in releases):
        return None
    return sum(query.pure_epsilon(count) for query, count in releases)


@kept_logging()
def _rdp_epsilon(releases: Releases, delta: float) -> float:
    divergences = [(_build_rdp_accountant(query), count) for query, count in releases]
    orders = divergences[0][0].orders
    return float(compute_epsilon(orders, sum(count * one.rdp for one, count in divergences), delta)[0])


@lru_cache(maxsize=64)
def _build_rdp_accountant(query: Query) -> RdpAccountant:
    """Return the Rényi divergences of one release, which take long. They add up, and answer for every delta."""
    return RdpAccountant(neighboring_relation=NEIGHBORING_RELATION).compose(query.event)


@lru_cache(maxsize=4)
def build_pld_accountant(releases: Releases, grid: float) -> PLDAccountant:
    """Return an accountant with the privacy loss distribution of `releases`, on a grid of width `grid`."""
    with dense_composition():
        return PLDAccountant(NEIGHBORING_RELATION, grid).compose(compose_events(releases))


def _pld_epsilon(releases: Releases, delta: float) -> float:
    (coarse,) = choose_grids(releases, math.inf)
    epsilon = read_epsilon(build_pld_accountant(releases, coarse), delta)
    finer = choose_grids(releases, epsilon)[1:]
    return min([epsilon, *(read_epsilon(build_pld_accountant(releases, grid), delta) for grid in finer)])


def is_costly(releases: Releases) -> bool:
    """Return whether `releases` take seconds to account for, so that their grids are coarser than those of real runs.

    >>> is_costly(((GaussianQuery(noise_multiplier=1.0, sampling_rate=0.01), 1000),))
    False
    """
    return predict_width(releases).choose_grid(FINE_GRID, LIMIT) > FINE_GRID


def choose_grids(releases: Releases, epsilon: float, *, limit: PointLimit = LIMIT) -> tuple[float, ...]:
    """Return the grids to use: the fine one, which is ten times slower, only where it could lower epsilon by 1 %.

    Args:
        releases: pairs of a query and the number of times it ran.
        epsilon: their epsilon, roughly.
        limit: the most points on a grid. A grid that would have more is made coarser.
    """
    width = predict_width(releases)
    coarse, fine = (width.choose_grid(grid, limit) for grid in (COARSE_GRID, FINE_GRID))
    is_enough = fine >= coarse or 30 * count_releases(releases) * coarse**2 < 0.01 * epsilon
    return (coarse,) if is_enough else (coarse, fine)
