"""What a recipe can learn. A new task is a file beside this one, and a line in `TASKS`."""

from hf_dpzo.recipe.tasks.causal_lm import CausalLM
from hf_dpzo.recipe.tasks.chat import Chat
from hf_dpzo.recipe.tasks.feature_classification import FeatureClassification, refuse_unread_fields
from hf_dpzo.recipe.tasks.generation import GenerationTask
from hf_dpzo.recipe.tasks.masked_lm import MaskedLM
from hf_dpzo.recipe.tasks.multiple_choice import MultipleChoice
from hf_dpzo.recipe.tasks.prompt_classification import PromptClassification, refuse_uncalibrated
from hf_dpzo.recipe.tasks.question_answering import QuestionAnswering
from hf_dpzo.recipe.tasks.regression import Regression
from hf_dpzo.recipe.tasks.seq2seq_lm import Seq2SeqLM
from hf_dpzo.recipe.tasks.sequence_classification import SequenceClassification
from hf_dpzo.recipe.tasks.several_labels import SeveralLabels
from hf_dpzo.recipe.tasks.task import Task
from hf_dpzo.recipe.tasks.token_classification import TokenClassification


TASKS: dict[str, Task] = {
    "prompt-classification": PromptClassification(),
    "sequence-classification": SequenceClassification(),
    "feature-classification": FeatureClassification(),
    "several-labels": SeveralLabels(),
    "regression": Regression(),
    "token-classification": TokenClassification(),
    "question-answering": QuestionAnswering(),
    "multiple-choice": MultipleChoice(),
    "masked-lm": MaskedLM(),
    "causal-lm": CausalLM(),
    "chat": Chat(),
    "seq2seq-lm": Seq2SeqLM(),
    "generation": GenerationTask(),
}


__all__ = ["TASKS", "Task", "refuse_uncalibrated", "refuse_unread_fields"]
