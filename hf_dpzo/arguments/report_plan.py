"""Plans the count of failing rows, which a run may release at its end for a share of its budget."""

from bisect import bisect_left
from dataclasses import replace

from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.calibration import calibrate_query
from hf_dpzo.privacy.mechanism import GaussianSum, LaplaceSum, NoisySum
from hf_dpzo.privacy.queries import LaplaceQuery, Query, Releases


# The noise multipliers of Gaussian counts to choose from. Less than the first would hardly show more.
NOISES = tuple(0.25 * 1.12**step for step in range(64))


def plan_report(
    query: Query, *, share: float, steps: int, trials: int, delta: float, earlier: Releases, expected_batch_size: int
) -> Releases:
    """Return the count that each of `trials` runs releases at its end, with the least noise that its share allows.

    Epsilon of all releases together is at most what it would be without the count, over `1 - share`.

    Args:
        query: what one step releases.
        share: the share of the budget, above 0 and at most 0.5.
        steps: the number of steps of one run.
        trials: the number of runs.
        delta: the delta at which epsilon is stated.
        earlier: what earlier runs released.
        expected_batch_size: the public constant that the count is divided by.

    >>> from hf_dpzo.privacy.queries import GaussianQuery
    >>> step = GaussianQuery(noise_multiplier=1.0, sampling_rate=0.1)
    >>> options = {"steps": 50, "trials": 1, "delta": 1e-5, "earlier": (), "expected_batch_size": 8}
    >>> round(plan_report(step, share=0.1, **options)[0][0].noise_multiplier, 1)
    0.7
    """
    if isinstance(query, LaplaceQuery):  # Pure epsilons add up.
        target = share / (1 - share) * query.pure_epsilon(steps)
        noise = calibrate_query(query, steps=1, target_epsilon=target, target_delta=delta).noise_multiplier
    else:
        noise = _find_least_noise(query, share=share, steps=steps, trials=trials, delta=delta, earlier=earlier)
    mechanism = build_report_mechanism(type(query), noise, expected_batch_size)
    return ((mechanism.query(query.sampling_rate), trials),)


def _find_least_noise(query: Query, *, share: float, steps: int, trials: int, delta: float, earlier: Releases) -> float:
    """Return the least of `NOISES` for Gaussian counts that keep epsilon at what it was over `1 - share`."""
    others: Releases = ((query, steps * trials), *earlier)
    target = account(others, delta=delta).epsilon / (1 - share)

    def exceeds(noise: float) -> bool:
        count = (replace(query, noise_multiplier=noise), trials)
        return account((*others, count), delta=delta).epsilon > target

    place = bisect_left(NOISES, 1, key=lambda noise: int(not exceeds(noise)))
    return NOISES[min(place, len(NOISES) - 1)]


def build_report_mechanism(kind: type[Query], noise_multiplier: float, expected_batch_size: int) -> NoisySum:
    """Return the mechanism that counts. A unit of privacy adds 1 at most, which is the clip norm."""
    mechanism = LaplaceSum if issubclass(kind, LaplaceQuery) else GaussianSum
    return mechanism(clip_norm=1.0, noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size)
