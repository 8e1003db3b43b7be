"""The claim of a run: its conditions, its terms, and what it means for a unit of privacy."""

import math
from collections.abc import Mapping
from typing import Any

from hf_dpzo.card.declarations import Declarations
from hf_dpzo.isolation.bound import MAX_ISOLATION_BOUND
from hf_dpzo.privacy.accounting import MAX_EPSILON, NEIGHBORING_RELATION, account_for_group, replace_one_epsilon
from hf_dpzo.privacy.interpretation import detection_rate, membership_accuracy, privacy_curve
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.trajectory.run import LoggedRun, describe_releases


FALSE_ALARMS = 0.01


# Numbers of rows of one person, if the unit is a row.
GROUPS = (2, 4)


# An audit of a run takes the claim back only if chance explains what it found less often than this.
AUDIT_CHANCE = 1e-4


AUDITED = "no audit of the run itself found more than is claimed, beyond what chance explains"


def list_conditions(run: LoggedRun, declarations: Declarations, isolation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the conditions of a run that is called private, and whether each holds."""
    budget = run.budget
    bound = isolation["bound_in_clip_norms"]
    small = budget.private and budget.delta < 1 / run.num_units
    promised = small and budget.guarantee().epsilon <= MAX_EPSILON
    empirical = declarations.empirical
    audited = {} if empirical is None else {AUDITED: empirical["chance"] >= AUDIT_CHANCE}
    held = {
        "every release holds noise": budget.private,
        "no step was taken beyond the plan": len(budget.ledger) <= budget.planned_steps,
        f"epsilon is at most {MAX_EPSILON:g}": promised,
        f"delta is below one over the number of {run.unit_name}s": small,
        f"rows of a batch move each other by at most {MAX_ISOLATION_BOUND} clip norms": isolation["status"]
        != "not measured"
        and bound is not None
        and bound <= MAX_ISOLATION_BOUND,
        "no attack that was made on the mechanism found more than is claimed": declarations.audit is None
        or declarations.audit["passed"],
        **audited,
    }
    return [{"condition": condition, "held": bool(value)} for condition, value in held.items()]


def build_claim(run: LoggedRun) -> dict[str, Any]:
    """Return the claim of `run`, with all its terms."""
    budget = run.budget
    return {
        "definition": "(epsilon, delta)-differential privacy",
        "epsilon": round_up(budget.guarantee().epsilon),
        "delta": budget.delta,
        "unit": run.unit_description,
        "neighboring_relation": NEIGHBORING_RELATION.name,
        "setting": "central: whoever trains sees the data, and is trusted with them",
        "released": ["weights", "all intermediate weights", "the released coefficients", "the training log"],
        "steps_taken": len(budget.ledger),
        "steps_claimed": budget.claimed_steps,
        **({"trials": budget.trials} if budget.trials > 1 else {}),
        **({"earlier": describe_releases(budget.earlier)} if budget.earlier else {}),
        **({"report": describe_releases(budget.report)} if budget.report else {}),
        "groups": _list_groups(run),
        "also": _list_other_guarantees(run),
    }


def build_meaning(run: LoggedRun) -> dict[str, Any]:
    """Return what the claim means for an attacker who guesses whether a unit took part."""
    releases, delta = run.budget.claimed_releases, run.budget.delta
    detected = detection_rate(releases, delta=delta, false_alarms=FALSE_ALARMS)
    return {
        "best_membership_accuracy": min(1.0, round_up(membership_accuracy(releases, delta=delta))),
        "detection_rate": {"false_alarms": FALSE_ALARMS, "detected": min(1.0, round_up(detected))},
        "privacy_curve": [
            {"delta": at, "epsilon": round_up(epsilon)} for at, epsilon in privacy_curve(releases, delta=delta)
        ],
    }


def _list_groups(run: LoggedRun) -> list[dict[str, Any]]:
    """List the epsilon for people with several rows, if the unit is a row."""
    if run.unit_column is not None:
        return []
    budget = run.budget
    epsilons = {size: account_for_group(budget.claimed_releases, size=size, delta=budget.delta) for size in GROUPS}
    return [
        {"rows": size, "epsilon": round_up(epsilon)} for size, epsilon in epsilons.items() if math.isfinite(epsilon)
    ]


def _list_other_guarantees(run: LoggedRun) -> list[dict[str, Any]]:
    """List what the same run guarantees in other terms."""
    budget = run.budget
    guarantees = []
    pure = budget.guarantee().pure
    if pure is not None:
        guarantees.append(("pure epsilon-differential privacy", pure, 0, NEIGHBORING_RELATION.name))
    if run.method.covers_replace_one:
        epsilon = replace_one_epsilon(budget.claimed_releases, delta=budget.delta)
        if math.isfinite(epsilon):
            guarantees.append(("(epsilon, delta)-differential privacy", epsilon, budget.delta, "REPLACE_ONE"))
    return [
        {"definition": definition, "epsilon": round_up(epsilon), "delta": delta, "neighboring_relation": relation}
        for definition, epsilon, delta, relation in guarantees
    ]
