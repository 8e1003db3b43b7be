"""Secret noise, clipping, the one door, accounting and planning. Knows no model and no direction.

Imports `distributed`, and never `zo`.
"""

# The modules that clip rows and draw noise need torch. They are not imported here, because planning does without it.
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
