"""Per-example losses for each kind of head, and classification by prompt.

Imports `models`.
"""

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.losses.generation_reward import GenerationReward
from hf_dpzo.losses.metric import MetricLoss
from hf_dpzo.losses.per_example import PerExampleLoss, ScoreLoss
from hf_dpzo.losses.prompting import LabelStringLoss, MaskedWordLoss, NextWordLoss, Prompt
from hf_dpzo.losses.sequence_classification import SequenceClassificationLoss
from hf_dpzo.losses.template import Template


__all__ = [
    "CausalLMLoss",
    "FunctionLoss",
    "GenerationReward",
    "LabelStringLoss",
    "MaskedWordLoss",
    "MetricLoss",
    "NextWordLoss",
    "PerExampleLoss",
    "Prompt",
    "ScoreLoss",
    "SequenceClassificationLoss",
    "Template",
]
