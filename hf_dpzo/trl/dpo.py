"""TRL's direct preference optimization, with private steps."""

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.trainer.trainer import ZOTrainer


@dataclass
class ZODPOConfig(ZOTrainingArguments, DPOConfig):
    """The fields of `ZOTrainingArguments` and of TRL's `DPOConfig`.

    Every `loss_type` is honoured that is a loss of one pair, as all but `aot` and `aot_unpaired` are, with what it
    reads. `use_weighting`, `sync_ref_model`, `padding_free` and `activation_offloading` are refused.
    """


class ZODPOTrainer(ZOTrainer, DPOTrainer):
    """Trains a causal language model on pairs of a preferred and another answer, privately.

    It takes the arguments of both trainers. A pair is one example, and has one loss (Rafailov et al. 2023). The
    reference is what the run begins from: the model without a new adapter, a frozen copy of an adapter or model, or
    `ref_model`. With `precompute_ref_log_probs=True` it is evaluated once for each row, and not at each probe point.
    `evaluate` also returns `eval_rewards/accuracies` and `eval_rewards/margins`.

    Guarantee: that of `ZOTrainer`, for a pair, or for all pairs of a user.

    Raises:
        ValueError: an argument, or a hook that a subclass overrides, would be ignored or break that guarantee.
    """
