"""TRL's reward models, with private steps."""

from dataclasses import dataclass

from trl import RewardConfig, RewardTrainer

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.trainer.trainer import ZOTrainer


@dataclass
class ZORewardConfig(ZOTrainingArguments, RewardConfig):
    """The fields of `ZOTrainingArguments` and of TRL's `RewardConfig`.

    `center_rewards_coefficient` is honoured; `activation_offloading` is refused.
    """


class ZORewardTrainer(ZOTrainer, RewardTrainer):
    """Trains a reward model on pairs of a preferred and another text, privately.

    It takes the arguments of both trainers. A pair is one example, and has one loss (Bradley and Terry 1952), with the
    column `margin` if there is one. `evaluate` also returns how often the preferred text has the larger reward,
    `eval_accuracy`, and the mean difference, `eval_margin`.

    Guarantee: that of `ZOTrainer`, for a pair, or for all pairs of a user.

    Raises:
        ValueError: an argument, or a hook that a subclass overrides, would be ignored or break that guarantee.
    """
