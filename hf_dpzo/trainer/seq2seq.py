"""`ZOTrainer` and `Seq2SeqTrainer` in one, ready to import."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_dpzo.arguments.foreign import explains_foreign_names
from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.trainer.trainer import ZOTrainer


@explains_foreign_names
@dataclass
class ZOSeq2SeqTrainingArguments(ZOTrainingArguments, Seq2SeqTrainingArguments):
    """Adds the arguments of generation to `ZOTrainingArguments`: `predict_with_generate`, `generation_max_length`, ...

    They say how the trained model is evaluated and how it predicts, and change nothing in training.
    """


class ZOSeq2SeqTrainer(ZOTrainer, Seq2SeqTrainer):
    """Trains privately as `ZOTrainer` does, and evaluates and predicts by generating as `Seq2SeqTrainer` does.

    With `predict_with_generate=True`, `compute_metrics` receives the generated tokens. `evaluate` and `predict` take
    arguments of generation, such as `max_new_tokens` and `num_beams`. The evaluation loss is that of `ZOTrainer`.
    """
