"""The audit of a run: what its log shows of the coins of its canaries, beside what its guarantee allows.

Two attacks are made, each with half of the error that is allowed to both together:

- Guesses. The coins of half of the canaries are guessed. The number of right guesses bounds epsilon from below by
  itself (Steinke, Nasr and Jagielski 2023). Beside the whole curve of epsilon over delta it bounds it better: it is the
  epsilon of the least noise with which a run like this could have led to so many right guesses only by chance.
- Spread. Each release is the sum of a step plus noise of its own. With the coins known, and the canaries' part taken
  off, what remains is spread at least as far as the noise is (Anderson 1955). So it bounds the noise from above, and
  epsilon from below.

Epsilon is never above the claim by more than chance, if the claim holds. Nothing is proved by a small one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from hf_dpzo.auditing.claims import GaussianClaim, LaplaceClaim
from hf_dpzo.auditing.one_run import Promise, find_threshold
from hf_dpzo.auditing.scores import Evidence, guess_coins, score_canaries
from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.privacy.mechanism import NoisySum
from hf_dpzo.privacy.queries import MAX_NOISE_MULTIPLIER, GaussianQuery, Releases
from hf_dpzo.step.descent import Descent
from hf_dpzo.step.estimate import StepEstimate
from hf_dpzo.trajectory.records import Record
from hf_dpzo.trajectory.replay import replay_records
from hf_dpzo.zo.walk import Walk


# The share of canaries whose coins are guessed. It was chosen before any coin was looked at.
GUESSED_SHARE = 0.5


# The noise of a run is compared with between a tenth and sixteen times of what is claimed.
LEAST_NOISE, MOST_NOISE = 0.1, 16.0


@dataclass(frozen=True, kw_only=True)
class RunAudit:
    """What an audit of a run found. All bounds hold together with the stated confidence.

    Args:
        canaries: the number of canaries.
        included: the number of those that were in the data.
        strength: the mean norm of what a canary adds to a step that it takes part in, in clip norms; 1 is best.
        steps: the number of steps that were replayed.
        guesses: the number of coins that were guessed.
        correct: the number of right guesses.
        confidence: the probability with which none of the bounds on epsilon exceeds what they bound.
        delta: the delta of the claim.
        epsilon_claimed: the claimed epsilon.
        from_guesses: a lower bound on epsilon that the guesses give if only the scale of the noise is in doubt.
        from_guesses_alone: a lower bound on epsilon at `delta` that the guesses give, whatever the mechanism is.
        from_spread: a lower bound on epsilon that the spread of releases gives, if noise of some scale was added.
        chance: the probability, at most, that a run that keeps its promise shows as much as this one.
        scores: the score of each canary, for the picture.
        coins: the coins of the canaries, for the picture.
    """

    canaries: int
    included: int
    strength: float
    steps: int
    guesses: int
    correct: int
    confidence: float
    delta: float
    epsilon_claimed: float
    from_guesses: float
    from_guesses_alone: float
    from_spread: float
    chance: float
    scores: tuple[float, ...]
    coins: tuple[bool, ...]

    @property
    def epsilon_lower(self) -> float:
        """The largest of the lower bounds on epsilon."""
        return max(self.from_guesses, self.from_guesses_alone, self.from_spread)

    @property
    def exceeds_claim(self) -> bool:
        """Whether the run showed more than its claim allows, at the stated confidence."""
        return self.chance <= 1 - self.confidence

    def as_json(self) -> dict[str, Any]:
        """Return everything but scores and coins, in JSON types. Lower bounds are rounded down."""
        values = {name: value for name, value in asdict(self).items() if name not in ("scores", "coins")}
        values["epsilon_lower"] = self.epsilon_lower
        for name in ("epsilon_lower", "from_guesses", "from_guesses_alone", "from_spread", "strength"):
            values[name] = math.floor(1e4 * values[name]) / 1e4
        return {**values, "exceeds_claim": self.exceeds_claim}


def measure_canaries(
    descent: Descent,
    records: Iterable[Record],
    estimate: StepEstimate,
    build_batch: Callable[[], LogicalBatch],
    *,
    points_per_pass: int | None = None,
) -> np.ndarray:
    """Replay `records`, and return what each canary adds to each step that it takes part in, `[canaries, steps, K]`.

    The canaries are evaluated at each stop of the walk as the rows of a batch are, and clipped in the same way.

    Args:
        descent: the descent at the beginning of the run.
        records: the records of the steps, in order.
        estimate: the estimate that evaluates a batch in training.
        build_batch: a function that returns a batch of all canaries, each a unit of its own.
        points_per_pass: the number of probe points of one forward pass, as in training.
    """
    measured = []

    def follow(step: int, walk: Walk) -> None:
        batch = build_batch()
        losses = [estimate.evaluate(stop, descent.model, batch) for stop in walk]
        coefficients = estimate.coefficients(losses, batch, descent.estimator(step))
        measured.append(descent.method.mechanism.clip_public(coefficients))

    replay_records(descent, records, follow=follow, points_per_pass=points_per_pass)
    return np.stack(measured, axis=1)


def audit_evidence(
    evidence: Evidence,
    coins: np.ndarray,
    *,
    mechanism: NoisySum,
    releases: Releases,
    delta: float,
    confidence: float = 0.95,
) -> RunAudit:
    """Compare what `evidence` shows of the `coins` with the claim.

    Guarantee: whatever the rows are, if the mechanism did what it claims, `epsilon_lower` exceeds the claimed epsilon
    with a probability of at most `1 - confidence`. For the bounds of guesses, the promise of `releases` is enough.

    Args:
        evidence: what was released, and what each canary adds.
        coins: whether each canary was in the data, `[canaries]`.
        mechanism: the mechanism of the run, which says how much noise it adds.
        releases: the releases that the claim is for.
        delta: the delta of the claim.
        confidence: the probability with which the bounds hold.
    """
    error = (1 - confidence) / 2
    guesses = 2 * max(1, int(GUESSED_SHARE * len(coins) / 2))
    scores = score_canaries(evidence)
    guessed = guess_coins(scores, guesses)
    correct = int((guessed == coins.astype(int)).sum())
    counts = {"canaries": len(coins), "guesses": guesses, "correct": correct}
    family = partial(_scale_noise, releases)
    noise, spread_chance = bound_noise(evidence, coins, mechanism, releases, error)
    guess_chance = _build_promise(releases, delta).chance(**counts)
    return RunAudit(
        **counts,
        included=int(coins.sum()),
        strength=float(np.linalg.norm(evidence.coefficients, axis=2).mean()),
        steps=len(evidence.released),
        confidence=confidence,
        delta=delta,
        epsilon_claimed=account(releases, delta=delta).epsilon,
        from_guesses=_bound_by_guesses(family, delta, error, guess_chance, counts),
        from_guesses_alone=_bound_by_guesses_alone(delta, error, counts),
        from_spread=0.0 if noise > MOST_NOISE else account(family(max(noise, LEAST_NOISE)), delta=delta).epsilon,
        chance=min(1.0, 2 * min(guess_chance, spread_chance)),
        scores=tuple(scores.tolist()),
        coins=tuple(coins.tolist()),
    )


def bound_noise(
    evidence: Evidence, coins: np.ndarray, mechanism: NoisySum, releases: Releases, error: float
) -> tuple[float, float]:
    """Return an upper bound on the noise, as a multiple of what is claimed, and a p-value of the claim.

    In each step, what the canaries that are in add on average is known before the step's noise is drawn. So is all
    else that the step adds up, if not to the auditor. A number that the noise is added to can only move the noise
    farther from zero, at each step given those before it, because its distribution is symmetric with one peak.

    Args:
        evidence: what was released, and what each canary adds.
        coins: whether each canary was in the data.
        mechanism: the mechanism, which says how much noise it adds.
        releases: the releases, which say what kind of noise it is.
        error: the probability with which the bound may be too low.
    """
    kind = GaussianClaim if isinstance(releases[0][0], GaussianQuery) else LaplaceClaim
    claim = kind(mechanism.noise_scale / SENSITIVITY)
    scale = claim.scale(evidence.released - evidence.predict(coins)) / claim.noise_multiplier
    size = evidence.released.size
    return scale / claim.quantile(size, error), claim.chance(size, scale)


@lru_cache(maxsize=256)
def _build_promise(releases: Releases, delta: float) -> Promise:
    """Return the promise of `releases`, which takes some tenths of a second."""
    return Promise.of_releases(releases, delta=delta)


def _scale_noise(releases: Releases, factor: float) -> Releases:
    """Return `releases` with `factor` times the noise."""
    scaled = (min(query.noise_multiplier * factor, 0.99 * MAX_NOISE_MULTIPLIER) for query, _ in releases)
    return tuple(
        (replace(query, noise_multiplier=noise), count) for (query, count), noise in zip(releases, scaled, strict=True)
    )


def _bound_by_guesses(
    family: Callable[[float], Releases], delta: float, error: float, chance: float, counts: dict[str, int]
) -> float:
    """Return the epsilon of the least noise, among multiples of the claimed, with which the guesses are too good.

    It is above the claim exactly where the claim itself is rejected, whose p-value is `chance`.
    """

    def is_rejected(inverse: float) -> bool:
        return _build_promise(family(1 / inverse), delta).chance(**counts) <= error

    low, high = (1.0, 1 / LEAST_NOISE) if chance <= error else (1 / MOST_NOISE, 1.0)
    if low < 1 and not is_rejected(low):
        return 0.0
    inverse = find_threshold(is_rejected, low=low, high=high, precision=0.01)
    return account(family(1 / inverse), delta=delta).epsilon


def _bound_by_guesses_alone(delta: float, error: float, counts: dict[str, int]) -> float:
    """Return the largest epsilon at `delta` for which the guesses are too good, whatever was released; 0 if none is."""

    def is_rejected(epsilon: float) -> bool:
        return Promise(pairs=((delta, epsilon),)).chance(**counts) <= error

    return find_threshold(is_rejected, low=1e-3, high=1e3) if is_rejected(1e-3) else 0.0


def collect_released(records: Iterable[Record]) -> np.ndarray:
    """Return what the records hold, in clip norms, `[steps, K]`."""
    return np.array([record.integers for record in records], dtype=np.float64) / SENSITIVITY
