"""The mechanism of a run, attacked: what it releases may say no more than it claims.

The attacker knows the claim, the seed and all rows but one. The mechanism is not believed but run, and compared with
what `query` says that one release at sampling rate 1 costs. Values are in clip norms over the expected batch size.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hf_dpzo.auditing.attack import Attack, Roc
from hf_dpzo.auditing.checks import (
    QUIET_NOISE_MULTIPLIER,
    Check,
    check_attacks,
    check_noise,
    check_secrecy,
    check_sums,
)
from hf_dpzo.auditing.claims import GaussianClaim, LaplaceClaim
from hf_dpzo.methods.method import PrivateMethod
from hf_dpzo.privacy.queries import GaussianQuery, NonPrivateQuery


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
    claim = (GaussianClaim if isinstance(query, GaussianQuery) else LaplaceClaim)(query.noise_multiplier)
    quiet = replace(mechanism, noise_multiplier=QUIET_NOISE_MULTIPLIER)
    count = max(200, releases * 8 // max(8, method.num_directions + 4))
    attacks = [Attack(mechanism, quiet, claim.canary(method.num_directions), others, count) for others in (0, 3)]
    noise = np.concatenate([attack.noise for attack in attacks])
    checks = [*check_attacks(attacks, claim), *check_noise(noise, claim), *check_sums(quiet, noise, claim, seed)]
    return Audit(
        checks=(*checks, *check_secrecy(mechanism, noise[0], claim, seed)),
        roc=max(attacks, key=lambda attack: attack.lower_bound(claim.strength)).build_roc(claim),
        mu_lower=max(attack.lower_bound(GaussianClaim.strength) for attack in attacks),
        mu_claimed=claim.strongest if isinstance(query, GaussianQuery) else None,
        releases=count,
    )
