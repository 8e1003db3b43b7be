"""The progress bar, with the epsilon spent beside it."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class EpsilonProgressCallback(ProgressCallback):
    """The stock progress bar, which also shows the last logged epsilon."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As stock; and put epsilon on the bar."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs is not None and "epsilon" in logs:
            self.training_bar.set_postfix(epsilon=logs["epsilon"])
