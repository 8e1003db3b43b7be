"""Progress bars that show epsilon, in a terminal and in a notebook, and bars whose clock goes on."""

import time
from collections.abc import Callable
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK


# How often a bar shows that work goes on, in seconds.
_REFRESHED_EVERY = 2.0


def build_refresh(bar: Any) -> Callable[[], None]:
    """Return a function that shows `bar` again with its clock, and the same number, if it has not done so lately."""
    shown = time.monotonic()

    def refresh() -> None:
        nonlocal shown
        if time.monotonic() - shown >= _REFRESHED_EVERY:
            bar.refresh()
            shown = time.monotonic()

    return refresh


def show_epsilon(trainer: Trainer) -> None:
    """Replace the stock progress bar of `trainer`, if it has one, by one that shows epsilon."""
    own: type[TrainerCallback] = EpsilonProgressCallback
    if DEFAULT_PROGRESS_CALLBACK is not ProgressCallback:  # Then this is a notebook, which needs IPython.
        from hf_dpzo.trainer.notebook import EpsilonNotebookCallback

        own = EpsilonNotebookCallback
    if DEFAULT_PROGRESS_CALLBACK in [type(callback) for callback in trainer.callback_handler.callbacks]:
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        trainer.add_callback(own)


class EpsilonProgressCallback(ProgressCallback):
    """The stock progress bars, which also say what they are of, and show the last logged epsilon."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show a bar as stock does, with a name."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show a bar as stock does, with a name."""
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None and not self.prediction_bar.desc:
            self.prediction_bar.set_description("Evaluating")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show logs as stock does, then put epsilon on the bar."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs is not None and "epsilon" in logs:
            self.training_bar.set_postfix(epsilon=logs["epsilon"])
