"""The checks of an audit: of its attacks, of the noise and its origin, and of the sums."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import special, stats

from hf_dpzo.auditing.attack import Attack, collect_releases
from hf_dpzo.auditing.claims import GaussianClaim
from hf_dpzo.data.sealed import run_sealed
from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.privacy.mechanism import NoisySum
from hf_dpzo.zo.directions import Gaussian, Rademacher


# The probability with which a sound mechanism fails each check, apart from the attacks.
ERROR = 1e-8


# The noise of releases that measure sums: 32 lattice steps, because half of that must still be noise.
QUIET_NOISE_MULTIPLIER = 2.0**-35


# More than that noise adds to a shift, in clip norms.
SLACK = 40 * QUIET_NOISE_MULTIPLIER


# The steps and directions that are compared with public streams, and the steps of two copies.
STEPS, COLUMNS, NUM_COPY_STEPS = 2048, 16, 256


AWKWARD = (math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e-320, 1e308, -1e308, 1.0, 1 + 2**-52, -1e20, 0.7)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of an audit.

    Args:
        name: the name of the check.
        measured: the measured value, with its unit.
        allowed: the values that the claim allows.
        passed: whether the measured value is one of them.
    """

    name: str
    measured: str
    allowed: str
    passed: bool


def check_attacks(attacks: list[Attack], claim: GaussianClaim) -> Iterator[Check]:
    """Compare what each attack found with the claim, and with pure epsilon if that is claimed."""
    for attack in attacks:
        yield _check(attack.name, attack.lower_bound(claim.strength), claim.symbol + " >= {:.4g}", most=claim.strongest)
    if claim.order == 1:
        bounds = [attack.lower_bound(lambda f, t: np.log(np.maximum(t / f, (1 - f) / (1 - t)))) for attack in attacks]
        yield _check("pure epsilon", max(bounds), "epsilon >= {:.4g}", most=claim.strongest)


def check_noise(noise: np.ndarray, claim: GaussianClaim) -> Iterator[Check]:
    """Check that `noise`, `[worlds, count, K]`, has the scale, the mean and the distribution that are claimed."""
    scales = np.array([claim.scale(world) for world in noise])
    least = claim.noise_multiplier * claim.quantile(noise[0].size, ERROR / len(noise))
    yield _check("noise scale", scales.min(), "{:.4g} clip norms", least=least)
    means = np.abs(noise.mean(axis=1)) * math.sqrt(noise.shape[1]) / np.maximum(noise.std(axis=1), 1e-300)
    yield _check("noise mean", means.max(), "{:.4g} standard errors", most=-special.ndtri(ERROR / means.size / 2))
    distance = stats.kstest((noise / scales[:, None, None]).ravel(), claim.distribution, method="asymp").statistic
    yield _check("noise shape", distance, "{:.4g} off", most=stats.kstwobign.isf(ERROR) / math.sqrt(noise.size))


def check_sums(quiet: NoisySum, noise: np.ndarray, claim: GaussianClaim, seed: int) -> Iterator[Check]:
    """Check that no row moves the sum by more than the claimed sensitivity: the noise over the noise multiplier."""
    directions = noise.shape[-1]
    implied = claim.scale(noise) / claim.noise_multiplier
    low, high = (implied / claim.quantile(noise.size, probability) for probability in (1 - ERROR, ERROR))
    # Rows are clipped to a norm of 1, or each coefficient is. If one of these agrees with the noise, it holds exactly.
    exact = [norm for norm in (1.0, directions ** (1 / claim.order)) if low <= norm <= high]
    shift = 0.0
    units = set()
    for rows in _generate_adversarial(directions, quiet.clip_norm, seed):
        without_one = ~torch.eye(len(rows) + 1, len(rows), dtype=torch.bool)  # The last one leaves out no row.
        releases = [quiet.release(rows[kept]) for kept in without_one]
        units |= {release.unit for release in releases}
        *parts, whole = np.array([release.coefficients for release in releases]) / quiet.clip_norm
        shift = max(shift, *(float(np.linalg.norm(whole - part, ord=claim.order)) for part in parts))
    allowed = max(exact, default=high) + SLACK * directions
    yield _check("sensitivity", shift * quiet.expected_batch_size, "{:.10g} clip norms", most=allowed)
    yield _check("units, over batches of all sizes", len(units), "{}", most=1)


def _generate_adversarial(directions: int, clip_norm: float, seed: int) -> Iterator[torch.Tensor]:
    """Generate batches `[rows, K]`: awkward values, alone and against saturated rows, and rows of unequal lengths."""
    generator = np.random.default_rng(seed)
    first = np.arange(directions) == 0
    signs = generator.choice([-1.0, 1.0], size=directions)
    for value in (*AWKWARD, *(clip_norm * np.array([0.5, 1, 1 + 2**-52, 1e3, 1e20]))):
        for row in (value * signs, *(np.where(first, value, rest) for rest in (value, 0.0, clip_norm))):
            against = np.vstack([row, np.full((3, directions), -10 * clip_norm)])
            yield from (torch.from_numpy(against[:1]), torch.from_numpy(against))
    for _ in range(50):
        rows = generator.normal(size=(generator.integers(1, 7), directions))
        rows = rows * 10.0 ** generator.integers(-6, 7) * clip_norm
        rows[generator.random(rows.shape) < 0.1] = generator.choice(AWKWARD)
        yield torch.from_numpy(rows)


def check_secrecy(mechanism: NoisySum, noise: np.ndarray, claim: GaussianClaim, seed: int) -> Iterator[Check]:
    """Check that `noise`, `[count, K]`, follows neither from public streams nor from itself or a copy."""
    empty = torch.zeros(0, noise.shape[1])
    sample = noise[:STEPS, :COLUMNS]
    yield _check_unrelated("noise and public streams", sample, _draw_public_streams(seed, len(sample)))
    yield _check_unrelated("noise and other noise", sample, sample)
    copies = (collect_releases(replace(mechanism), empty, NUM_COPY_STEPS)[:, :COLUMNS] for _ in range(2))
    yield _check_unrelated("noise of two copies", *copies)
    # Two draws agree with probability 0.3 / scale.
    chance = 0.15 * noise.size**2 / (claim.noise_multiplier * SENSITIVITY)
    yield _check("repeated noise", noise.size - np.unique(noise).size, "{}", most=stats.poisson.isf(ERROR, chance))
    try:
        run_sealed("release", lambda: collect_releases(mechanism, empty, 8))
        state = "untouched"
    except RuntimeError:
        state = "used"
    yield Check(name="global generators", measured=state, allowed="untouched", passed=state == "untouched")


def _draw_public_streams(seed: int, steps: int) -> np.ndarray:
    """Draw the streams that an attacker could draw in place of the noise, `[steps, streams]`."""
    directions = [distribution(seed=seed, sizes=[2]) for distribution in (Gaussian, Rademacher)]
    streams = [
        [source.values(index=0, step=step, direction=k) for source in directions for k in (0, 1)]
        for step in range(steps)
    ]
    for step, values in enumerate(streams):
        step_seed = (seed + step) % 2**64
        values.append(torch.empty(1).normal_(generator=torch.Generator().manual_seed(step_seed)))
        values.append(torch.tensor([np.random.default_rng(step_seed).standard_normal()]))
    return np.array([torch.cat(values).tolist() for values in streams])


def _check_unrelated(name: str, first: np.ndarray, second: np.ndarray) -> Check:
    """Check that no column of `first` has a rank correlation with one of `second`, at any shift in time.

    Both are `[steps, columns]`.
    """
    ranks = (values.argsort(axis=0).argsort(axis=0) for values in (first, second))
    scores = (special.ndtri((rank + 0.5) / len(first)) for rank in ranks)
    waves, other_waves = (np.fft.fft(score / np.linalg.norm(score[:, 0]), axis=0) for score in scores)
    correlations = np.abs(np.fft.ifft(waves.conj()[:, :, None] * other_waves[:, None, :], axis=0).real)
    if first is second:
        correlations[0][np.diag_indices(first.shape[1])] = 0.0
    chance = -special.ndtri(ERROR / correlations.size / 2) / math.sqrt(len(first))
    return _check(name, correlations.max(), "{:.4g} correlated", most=chance)


def _check(name: str, value: float, shown: str, *, least: float = -math.inf, most: float = math.inf) -> Check:
    allowed = f"<= {most:.5g}" if most < math.inf else f">= {least:.4g}"
    return Check(name=name, measured=shown.format(value), allowed=allowed, passed=bool(least <= value <= most))
