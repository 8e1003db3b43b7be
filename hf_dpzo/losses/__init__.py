"""Per-example losses for each kind of head, and classification by prompt.

Imports `models`.
"""

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.losses.masked_lm import MaskedLMLoss
from hf_dpzo.losses.multiple_choice import MultipleChoiceLoss
from hf_dpzo.losses.own import OwnLoss
from hf_dpzo.losses.per_example import PerExampleLoss, ScoreLoss
from hf_dpzo.losses.prompting import LabelStringLoss, MaskedWordLoss, NextWordLoss, Prompt, Template
from hf_dpzo.losses.question_answering import QuestionAnsweringLoss
from hf_dpzo.losses.seq2seq import Seq2SeqLoss
from hf_dpzo.losses.sequence_classification import SequenceClassificationLoss
from hf_dpzo.losses.token_classification import TokenClassificationLoss


__all__ = [
    "CausalLMLoss",
    "FunctionLoss",
    "LabelStringLoss",
    "MaskedLMLoss",
    "MaskedWordLoss",
    "MultipleChoiceLoss",
    "NextWordLoss",
    "OwnLoss",
    "PerExampleLoss",
    "Prompt",
    "QuestionAnsweringLoss",
    "ScoreLoss",
    "Seq2SeqLoss",
    "SequenceClassificationLoss",
    "Template",
    "TokenClassificationLoss",
]
