"""The checks of an audit: the attacks, the noise, the sums, and where the noise comes from."""

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


# A sound mechanism fails any one of the checks that are no attacks with this chance.
ERROR = 1e-8


# Noise to measure sums by: 32 lattice steps, because half of it must still be some.
QUIET_NOISE_MULTIPLIER = 2.0**-35


# In clip norms: more than that noise adds to a shift.
SLACK = 40 * QUIET_NOISE_MULTIPLIER


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


def check_attacks(attacks: list[Attack], claim: GaussianClaim) -> Iterator[Check]:
    """Compare what each attack found with the claim, and pure epsilon too where it is claimed."""
    for attack in attacks:
        yield _check(attack.name, attack.lower_bound(claim.strength), claim.symbol + " >= {:.4g}", most=claim.strongest)
    if claim.order == 1:
        bounds = [attack.lower_bound(lambda f, t: np.log(np.maximum(t / f, (1 - f) / (1 - t)))) for attack in attacks]
        yield _check("pure epsilon", max(bounds), "epsilon >= {:.4g}", most=claim.strongest)


def check_noise(noise: np.ndarray, claim: GaussianClaim) -> Iterator[Check]:
    """`noise` is `[worlds, count, K]`."""
    scales = np.array([claim.scale(world) for world in noise])
    least = claim.noise_multiplier * claim.quantile(noise[0].size, ERROR / len(noise))
    yield _check("noise scale", scales.min(), "{:.4g} clip norms", least=least)
    means = np.abs(noise.mean(axis=1)) * math.sqrt(noise.shape[1]) / np.maximum(noise.std(axis=1), 1e-300)
    yield _check("noise mean", means.max(), "{:.4g} standard errors", most=-special.ndtri(ERROR / means.size / 2))
    distance = stats.kstest((noise / scales[:, None, None]).ravel(), claim.distribution, method="asymp").statistic
    yield _check("noise shape", distance, "{:.4g} off", most=stats.kstwobign.isf(ERROR) / math.sqrt(noise.size))


def check_sums(quiet: NoisySum, noise: np.ndarray, claim: GaussianClaim, seed: int) -> Iterator[Check]:
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


def check_secrecy(mechanism: NoisySum, noise: np.ndarray, claim: GaussianClaim, seed: int) -> Iterator[Check]:
    """`noise`, `[count, K]`, follows from nothing else."""
    empty, some = torch.zeros(0, noise.shape[1]), noise[:STEPS, :COLUMNS]
    yield _check_unrelated("noise and public streams", some, _public_streams(seed, len(some)))
    yield _check_unrelated("noise and other noise", some, some)
    copies = (collect_releases(replace(mechanism), empty, NUM_COPY_STEPS)[:, :COLUMNS] for _ in range(2))
    yield _check_unrelated("noise of two copies", *copies)
    chance = 0.15 * noise.size**2 / (claim.noise_multiplier * SENSITIVITY)  # Two draws agree by 0.3 over the scale.
    yield _check("repeated noise", noise.size - np.unique(noise).size, "{}", most=stats.poisson.isf(ERROR, chance))
    try:
        run_sealed("release", lambda: collect_releases(mechanism, empty, 8))
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


def _check(name: str, value: float, shown: str, *, least: float = -math.inf, most: float = math.inf) -> Check:
    allowed = f"<= {most:.5g}" if most < math.inf else f">= {least:.4g}"
    return Check(name=name, measured=shown.format(value), allowed=allowed, passed=bool(least <= value <= most))
