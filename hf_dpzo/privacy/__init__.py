"""Secret noise, clipping, the one door, accounting and planning. Knows no model and no direction.

Imports `distributed`, and never `zo`.
"""

# What draws noise and clips needs torch, and planning does not: those modules are not imported here.
from hf_dpzo.privacy.accounting import Guarantee
from hf_dpzo.privacy.ledger import Budget, BudgetExceededError
from hf_dpzo.privacy.planning import Curve, CurvePoint, Plan, compute_curve
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery, Query
from hf_dpzo.privacy.questions import calibrate, group_epsilon, guarantee


__all__ = [
    "Budget",
    "BudgetExceededError",
    "Curve",
    "CurvePoint",
    "GaussianQuery",
    "Guarantee",
    "LaplaceQuery",
    "NonPrivateQuery",
    "Plan",
    "Query",
    "calibrate",
    "compute_curve",
    "group_epsilon",
    "guarantee",
]
