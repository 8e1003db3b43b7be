"""The audit of a mechanism: its releases may reveal no more than it claims.

The attacker knows the claim, the seed and all rows but one. The mechanism is not trusted but run, and compared with
what its `query` says that one release at sampling rate 1 costs. Values are in clip norms over the expected batch size.
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
    """The result of an audit.

    Args:
        checks: the checks, in the order of the table.
        roc: the curve of the attack that came closest to the claim.
        mu_lower: a lower bound on one release's mu, of Gaussian differential privacy (Dong, Roth and Su 2022).
        mu_claimed: the mu that is claimed; `None` if the noise is not Gaussian.
        releases: the number of releases in each of the two worlds of each attack.
    """

    checks: tuple[Check, ...]
    roc: Roc
    mu_lower: float
    mu_claimed: float | None
    releases: int

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the curve, in JSON types."""
        values = {"passed": self.passed, **asdict(self)}
        return json.loads(json.dumps({name: value for name, value in values.items() if name != "roc"}))


def audit_or_raise(method: PrivateMethod, *, seed: int) -> Audit:
    """Audit the mechanism of `method` before a run uses it. See `audit`.

    Raises:
        ValueError: the mechanism claims nothing.
        RuntimeError: the mechanism releases more than it claims.
    """
    result = audit(method, seed=seed)
    failed = [check.name for check in result.checks if not check.passed]
    if failed:
        raise RuntimeError(f"audit: {', '.join(failed)}: the mechanism releases more than it claims; do not use it.")
    return result


def audit(method: PrivateMethod, *, seed: int, releases: int = 20_000) -> Audit:
    """Attack the mechanism of `method`, in about 20 seconds of one core at the default.

    A pass is no proof. Batches have few rows, and the noise is compared only with the streams that it is likeliest to
    have been drawn from. A sound mechanism fails about once in a million audits. The two worlds, with and without one
    row, are those of Nasr et al. 2023.

    Args:
        method: a method with an unused mechanism, because its noise is compared with public streams from their start.
        seed: the run's public seed.
        releases: the number of releases in each of the two worlds of each attack, at least 200. More than four
            directions get fewer.

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
