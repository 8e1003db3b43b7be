"""One loss for each example, for each kind of head.

Imports `models`.
"""

from hf_dpzo.losses.per_example import (
    CausalLMLoss,
    FunctionLoss,
    PerExampleLoss,
    ScoreLoss,
    SequenceClassificationLoss,
)
from hf_dpzo.losses.prompting import LabelStringLoss, MaskedWordLoss, NextWordLoss, Prompt, Template


__all__ = [
    "CausalLMLoss",
    "FunctionLoss",
    "LabelStringLoss",
    "MaskedWordLoss",
    "NextWordLoss",
    "PerExampleLoss",
    "Prompt",
    "ScoreLoss",
    "SequenceClassificationLoss",
    "Template",
]
