"""TRL's supervised fine-tuning, with private steps."""

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.trainer.trainer import ZOTrainer


@dataclass
class ZOSFTConfig(ZOTrainingArguments, SFTConfig):
    """The fields of `ZOTrainingArguments` and of TRL's `SFTConfig`.

    What prepares rows and labels is honoured, such as `assistant_only_loss`, and `loss_type` is. `packing`,
    `padding_free` and `activation_offloading` are refused.
    """


class ZOSFTTrainer(ZOTrainer, SFTTrainer):
    """Fine-tunes a causal language model on texts, on prompts with completions, or on conversations, privately.

    It takes the arguments of both trainers, such as `peft_config` and `per_example_loss`. TRL prepares rows and labels.
    One row is one example, whose loss is the mean over its tokens with labels. The metrics that TRL computes of
    training rows are not computed.

    Guarantee: that of `ZOTrainer`.

    Raises:
        ValueError: an argument, or a hook that a subclass overrides, would be ignored or break that guarantee.
    """
