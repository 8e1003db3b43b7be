"""The mechanism of a run, attacked: what it releases may say no more than it claims.

The attacker knows the claim, the seed and all rows but one. The mechanism is not believed but run, and compared with
what `query` says that one release at sampling rate 1 costs. Values are in clip norms over the expected batch size.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import special, stats

from hf_dpzo.data.sealed import run_sealed
from hf_dpzo.methods.method import PrivateMethod
from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.privacy.mechanism import NoisySum
from hf_dpzo.privacy.queries import GaussianQuery, NonPrivateQuery
from hf_dpzo.zo.directions import Gaussian, Rademacher


# The bounds of the attacks hold together, but for the first. A sound mechanism fails any other check with the second.
ATTACK_ERROR, ERROR = 1e-4, 1e-8


# Noise to measure sums by, 32 lattice steps, for half of it must still be some; and more than it adds to a shift.
QUIET_NOISE_MULTIPLIER, SLACK = 2.0**-35, 40 * 2.0**-35


# Steps and directions that are compared with public streams, and steps of two copies.
STEPS, COLUMNS, NUM_COPY_STEPS = 2048, 16, 256


AWKWARD = (math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e-320, 1e308, -1e308, 1.0, 1 + 2**-52, -1e20, 0.7)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the audit: what was measured, and what the claim allows."""

    name: str
    measured: str
    allowed: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Roc:
    """The best attacker: shares of false alarms, of detections, and of the most detections that are allowed there."""

    false_alarms: tuple[float, ...]
    detections: tuple[float, ...]
    allowed: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found.

    Args:
        checks: the lines of the table.
        roc: of the attack that came closest to the claim.
        mu_lower: a lower bound on one release's mu, of Gaussian differential privacy (Dong, Roth and Su 2022).
        mu_claimed: what is claimed; `None` where the noise is not Gaussian.
        releases: how many were made in each of the two worlds of each attack.
    """

    checks: tuple[Check, ...]
    roc: Roc
    mu_lower: float
    mu_claimed: float | None
    releases: int

    @property
    def passed(self) -> bool:
        """Whether all checks did."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Everything but the curve, as JSON knows it."""
        found = {"passed": self.passed, **asdict(self)}
        return json.loads(json.dumps({name: value for name, value in found.items() if name != "roc"}))


def audit_or_raise(method: PrivateMethod, *, seed: int) -> Audit:
    """Audit a mechanism that is about to be used.

    Raises:
        ValueError: the mechanism claims nothing.
        RuntimeError: it releases more than it claims.
    """
    found = audit(method, seed=seed)
    failed = [check.name for check in found.checks if not check.passed]
    if failed:
        raise RuntimeError(f"audit: {', '.join(failed)}: the mechanism releases more than it claims; do not use it.")
    return found


def audit(method: PrivateMethod, *, seed: int, releases: int = 20_000) -> Audit:
    """Attack the mechanism of `method`, in some 20 seconds of one core at the default.

    A pass is no proof: batches are of few rows, and of the streams that noise might have been drawn from the likeliest
    are compared. A sound mechanism fails about once in a million. The two worlds are those of Nasr et al. 2023.

    Args:
        method: with a mechanism as yet unused, for its noise is compared with public streams from their beginning.
        seed: the run's public seed.
        releases: in each of the two worlds of each attack, from 200; fewer are made for more than four directions.

    Raises:
        ValueError: the mechanism claims nothing.

    >>> from hf_dpzo.methods import DPZero
    >>> audit(DPZero(noise_multiplier=1.0, expected_batch_size=8), seed=0, releases=200).passed
    True
    """
    mechanism, query = method.mechanism, method.mechanism.query(1.0)
    if isinstance(query, NonPrivateQuery):
        raise ValueError(f"noise_multiplier={method.noise_multiplier:g}: no noise, no claim to attack; set it above 0.")
    claim = (_GaussianClaim if isinstance(query, GaussianQuery) else _LaplaceClaim)(query.noise_multiplier)
    quiet = replace(mechanism, noise_multiplier=QUIET_NOISE_MULTIPLIER)
    count = max(200, releases * 8 // max(8, method.num_directions + 4))
    attacks = [_Attack(mechanism, quiet, claim.canary(method.num_directions), others, count) for others in (0, 3)]
    noise = np.concatenate([attack.noise for attack in attacks])
    checks = [*_check_attacks(attacks, claim), *_check_noise(noise, claim), *_check_sums(quiet, noise, claim, seed)]
    return Audit(
        checks=(*checks, *_check_secrecy(mechanism, noise[0], claim, seed)),
        roc=max(attacks, key=lambda attack: attack.lower_bound(claim.strength)).build_roc(claim),
        mu_lower=max(attack.lower_bound(_GaussianClaim.strength) for attack in attacks),
        mu_claimed=claim.strongest if isinstance(query, GaussianQuery) else None,
        releases=count,
    )


class _GaussianClaim:
    """What Gaussian noise allows: the curve whose mu is one over the noise multiplier."""

    # Of the norm that sensitivity is measured in, and of the moment that is the noise's scale.
    order, symbol, distribution = 2, "mu", "norm"

    def __init__(self, noise_multiplier: float) -> None:
        self.noise_multiplier, self.strongest = noise_multiplier, 1 / noise_multiplier

    def canary(self, directions: int) -> np.ndarray:
        """The row, up to its length, that is told best. The best tests are thresholds on the projection."""
        return np.ones(directions)  # As long as a row can be, even where each coefficient is clipped by itself.

    def detections(self, alarms: np.ndarray) -> np.ndarray:
        """The largest shares that are allowed."""
        return special.ndtr(special.ndtri(alarms) + self.strongest)

    @staticmethod
    def strength(alarms: np.ndarray, detections: np.ndarray) -> np.ndarray:
        """One over the noise multiplier whose curve runs through these points."""
        return special.ndtri(detections) - special.ndtri(alarms)

    def scale(self, noise: np.ndarray) -> float:
        """Root mean square, or mean absolute value; never quite zero."""
        return max(float(np.mean(np.abs(noise) ** self.order)) ** (1 / self.order), 1e-300)

    def quantile(self, count: int, probability: float) -> float:
        """Of the scale of `count` draws of scale 1: a root of chi-squared."""
        degrees = 2 * count / self.order
        return float(stats.chi2.ppf(probability, degrees) / degrees) ** (1 / self.order)


class _LaplaceClaim(_GaussianClaim):
    """What Laplace noise allows, where neighbours differ in one coefficient (Dong, Roth and Su 2022)."""

    order, symbol, distribution = 1, "epsilon", "laplace"

    def canary(self, directions: int) -> np.ndarray:
        return np.eye(directions)[0]

    def detections(self, alarms: np.ndarray) -> np.ndarray:
        rare = max(math.exp(-self.strongest), 1e-300)
        middle = 1 - rare / (4 * np.maximum(alarms, rare / 2))
        return np.select([2 * alarms <= rare, alarms <= 0.5], [alarms / rare, middle], 1 - rare * (1 - alarms))

    @staticmethod
    def strength(alarms: np.ndarray, detections: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            low, high = np.log(detections / alarms), np.log((1 - alarms) / (1 - detections))
            return np.select([detections <= 0.5, alarms <= 0.5], [low, -np.log(4 * alarms * (1 - detections))], high)


class _Attack:
    """Releases without a row and with it, beside others that lie as far from it as they can."""

    def __init__(self, mechanism: NoisySum, quiet: NoisySum, canary: np.ndarray, others: int, count: int) -> None:
        self.name = f"a row beside {others} others" if others else "a row alone"
        row = mechanism.clip_norm * torch.from_numpy(canary)
        with_row = torch.stack([1000 * row, *[-10 * row] * others])
        values = np.stack([_collect_releases(mechanism, rows, count) for rows in (with_row[1:], with_row)])
        self.noise = values - np.stack([_collect_releases(quiet, rows, 1) for rows in (with_row[1:], with_row)])
        self._scores = values @ canary

    def lower_bound(self, measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
        """From below, by one half of the releases, at the threshold that is best on the other."""
        chosen, judged = np.array_split(self._scores, 2, axis=1)
        thresholds = np.quantile(chosen, np.linspace(0.02, 0.98, 49))
        best = np.argmax(measure(*_rates(chosen, thresholds)))
        return max(0.0, float(measure(*_rates(judged, thresholds[best : best + 1]))[0]))

    def build_roc(self, claim: _GaussianClaim) -> Roc:
        thresholds = np.append(np.quantile(self._scores, np.linspace(1, 0, 199)), -np.inf)
        alarms, hits = (self._scores[:, None] > thresholds[:, None]).mean(axis=2)
        allowed = claim.detections(np.maximum(alarms, 1 / self._scores.shape[1]))  # No alarm may be up to one.
        return Roc(false_alarms=(*alarms.tolist(),), detections=(*hits.tolist(),), allowed=(*allowed.tolist(),))


def _collect_releases(mechanism: NoisySum, rows: torch.Tensor, count: int) -> np.ndarray:
    unit = mechanism.expected_batch_size / mechanism.clip_norm
    return unit * np.array([mechanism.release(rows).coefficients for _ in range(count)])


def _rates(scores: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of false alarms, an upper bound, and of detections, a lower one (Clopper and Pearson 1934)."""
    alarms, hits = (scores[:, None] > thresholds[:, None]).sum(axis=2)
    count, error = scores.shape[1], ATTACK_ERROR / 4  # Two bounds, two attacks.
    upper = special.betaincinv(alarms + 1, np.maximum(count - alarms, 1), 1 - error)
    lower = special.betaincinv(np.maximum(hits, 1), count - hits + 1, error)
    return np.where(alarms < count, upper, 1.0), np.where(hits > 0, lower, 0.0)


def _check_attacks(attacks: list[_Attack], claim: _GaussianClaim) -> Iterator[Check]:
    for attack in attacks:
        yield _check(attack.name, attack.lower_bound(claim.strength), claim.symbol + " >= {:.4g}", most=claim.strongest)
    if claim.order == 1:
        bounds = [attack.lower_bound(lambda f, t: np.log(np.maximum(t / f, (1 - f) / (1 - t)))) for attack in attacks]
        yield _check("pure epsilon", max(bounds), "epsilon >= {:.4g}", most=claim.strongest)


def _check(name: str, value: float, shown: str, *, least: float = -math.inf, most: float = math.inf) -> Check:
    allowed = f"<= {most:.5g}" if most < math.inf else f">= {least:.4g}"
    return Check(name=name, measured=shown.format(value), allowed=allowed, passed=bool(least <= value <= most))


def _check_noise(noise: np.ndarray, claim: _GaussianClaim) -> Iterator[Check]:
    """`noise` is `[worlds, count, K]`."""
    scales = np.array([claim.scale(world) for world in noise])
    least = claim.noise_multiplier * claim.quantile(noise[0].size, ERROR / len(noise))
    yield _check("noise scale", scales.min(), "{:.4g} clip norms", least=least)
    means = np.abs(noise.mean(axis=1)) * math.sqrt(noise.shape[1]) / np.maximum(noise.std(axis=1), 1e-300)
    yield _check("noise mean", means.max(), "{:.4g} standard errors", most=-special.ndtri(ERROR / means.size / 2))
    distance = stats.kstest((noise / scales[:, None, None]).ravel(), claim.distribution, method="asymp").statistic
    yield _check("noise shape", distance, "{:.4g} off", most=stats.kstwobign.isf(ERROR) / math.sqrt(noise.size))


def _check_sums(quiet: NoisySum, noise: np.ndarray, claim: _GaussianClaim, seed: int) -> Iterator[Check]:
    """The sensitivity that is claimed is the noise over the noise multiplier; no row may move the sum by more."""
    directions, implied = noise.shape[-1], claim.scale(noise) / claim.noise_multiplier
    low, high = (implied / claim.quantile(noise.size, at) for at in (1 - ERROR, ERROR))
    # Rows are clipped to a norm of 1, or each of their coefficients is. What agrees with the noise is meant exactly.
    meant = [norm for norm in (1.0, directions ** (1 / claim.order)) if low <= norm <= high]
    shift, units = 0.0, set()
    for rows in _generate_adversarial(directions, quiet.clip_norm, seed):
        without_one = ~torch.eye(len(rows) + 1, len(rows), dtype=torch.bool)  # And the last without none.
        releases = [quiet.release(rows[kept]) for kept in without_one]
        units |= {release.unit for release in releases}
        *parts, whole = np.array([release.coefficients for release in releases]) / quiet.clip_norm
        shift = max(shift, *(float(np.linalg.norm(whole - part, ord=claim.order)) for part in parts))
    allowed = max(meant, default=high) + SLACK * directions
    yield _check("sensitivity", shift * quiet.expected_batch_size, "{:.10g} clip norms", most=allowed)
    yield _check("units, over batches of all sizes", len(units), "{}", most=1)


def _generate_adversarial(directions: int, clip_norm: float, seed: int) -> Iterator[torch.Tensor]:
    """Batches `[rows, K]`: awkward values, alone and against saturated rows, and rows of very different lengths."""
    draw = np.random.default_rng(seed)
    first, signs = np.arange(directions) == 0, draw.choice([-1.0, 1.0], size=directions)
    for value in (*AWKWARD, *(clip_norm * np.array([0.5, 1, 1 + 2**-52, 1e3, 1e20]))):
        for row in (value * signs, *(np.where(first, value, rest) for rest in (value, 0.0, clip_norm))):
            against = np.vstack([row, np.full((3, directions), -10 * clip_norm)])
            yield from (torch.from_numpy(against[:1]), torch.from_numpy(against))
    for _ in range(50):
        rows = draw.normal(size=(draw.integers(1, 7), directions)) * 10.0 ** draw.integers(-6, 7) * clip_norm
        rows[draw.random(rows.shape) < 0.1] = draw.choice(AWKWARD)
        yield torch.from_numpy(rows)


def _check_secrecy(mechanism: NoisySum, noise: np.ndarray, claim: _GaussianClaim, seed: int) -> Iterator[Check]:
    """`noise`, `[count, K]`, follows from nothing else."""
    empty, some = torch.zeros(0, noise.shape[1]), noise[:STEPS, :COLUMNS]
    yield _check_unrelated("noise and public streams", some, _public_streams(seed, len(some)))
    yield _check_unrelated("noise and other noise", some, some)
    copies = (_collect_releases(replace(mechanism), empty, NUM_COPY_STEPS)[:, :COLUMNS] for _ in range(2))
    yield _check_unrelated("noise of two copies", *copies)
    chance = 0.15 * noise.size**2 / (claim.noise_multiplier * SENSITIVITY)  # Two draws agree by 0.3 over the scale.
    yield _check("repeated noise", noise.size - np.unique(noise).size, "{}", most=stats.poisson.isf(ERROR, chance))
    try:
        run_sealed("release", lambda: _collect_releases(mechanism, empty, 8))
        found = "untouched"
    except RuntimeError:
        found = "used"
    yield Check(name="global generators", measured=found, allowed="untouched", passed=found == "untouched")


def _public_streams(seed: int, steps: int) -> np.ndarray:
    """What anybody could draw in the place of noise, `[steps, streams]`."""
    kinds = [kind(seed=seed, sizes=[2]) for kind in (Gaussian, Rademacher)]
    streams = [
        [kind.values(index=0, step=step, direction=k) for kind in kinds for k in (0, 1)] for step in range(steps)
    ]
    for step, drawn in enumerate(streams):
        again = (seed + step) % 2**64
        drawn.append(torch.empty(1).normal_(generator=torch.Generator().manual_seed(again)))
        drawn.append(torch.tensor([np.random.default_rng(again).standard_normal()]))
    return np.array([torch.cat(drawn).tolist() for drawn in streams])


def _check_unrelated(name: str, first: np.ndarray, second: np.ndarray) -> Check:
    """No column, `[steps, columns]`, has a rank correlation with another, however far they are shifted in time."""
    scores = (special.ndtri((one.argsort(axis=0).argsort(axis=0) + 0.5) / len(one)) for one in (first, second))
    waves, others = (np.fft.fft(one / np.linalg.norm(one[:, 0]), axis=0) for one in scores)
    found = np.abs(np.fft.ifft(waves.conj()[:, :, None] * others[:, None, :], axis=0).real)
    if first is second:
        found[0][np.diag_indices(first.shape[1])] = 0.0
    chance = -special.ndtri(ERROR / found.size / 2) / math.sqrt(len(first))
    return _check(name, found.max(), "{:.4g} correlated", most=chance)
