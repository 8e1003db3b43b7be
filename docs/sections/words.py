"""What an epsilon means in plain numbers, as the cards of runs compute it. The glossary holds the table itself."""

import math

from hf_dpzo.privacy import calibrate
from hf_dpzo.privacy.interpretation import detection_rate, membership_accuracy

from sections.markdown import table


EPSILONS = (0.1, 0.5, 1, 2, 4, 8, 16)


DELTA, FALSE_ALARMS = 1e-5, 0.01


# A run of which each step takes all rows.
WHOLE = {"num_rows": 10_000, "expected_batch_size": 10_000, "max_steps": 80, "target_delta": DELTA}


def build_words() -> str:
    """Return a table of the best membership guess, and of detection at 1 % false alarms, for some epsilons."""
    head = (
        "ε",
        "right guesses, any mechanism",
        "a run with all rows in each step",
        "found at 1 % false alarms",
        "such a run",
    )
    return table(head, (_describe(epsilon) for epsilon in EPSILONS))


def guess_any(epsilon: float) -> float:
    """Return the largest share of right guesses that any mechanism of (epsilon, `DELTA`) allows."""
    return (math.exp(epsilon) + DELTA) / (1 + math.exp(epsilon))


def detect_any(epsilon: float) -> float:
    """Return the largest share of used rows that any such mechanism lets be found (Kairouz et al. 2015)."""
    return min(FALSE_ALARMS * math.exp(epsilon) + DELTA, 1 - (1 - FALSE_ALARMS - DELTA) * math.exp(-epsilon))


def _describe(epsilon: float) -> list[str]:
    releases = ((calibrate(target_epsilon=epsilon, **WHOLE), WHOLE["max_steps"]),)
    shares = (
        guess_any(epsilon),
        membership_accuracy(releases, delta=DELTA),
        detect_any(epsilon),
        detection_rate(releases, delta=DELTA, false_alarms=FALSE_ALARMS),
    )
    return [f"{epsilon:g}", *(_round_up(share) for share in shares)]


def _round_up(share: float) -> str:
    return f"{math.ceil(share * 1000) / 10:g} %"
