"""`ZOTrainer`: thirteen classes, each a layer on the stock Trainer.

Imports everything from `io` to `arguments`.
"""

from hf_dpzo.trainer.seq2seq import ZOSeq2SeqTrainer, ZOSeq2SeqTrainingArguments
from hf_dpzo.trainer.trainer import ZOTrainer


__all__ = ["ZOSeq2SeqTrainer", "ZOSeq2SeqTrainingArguments", "ZOTrainer"]
