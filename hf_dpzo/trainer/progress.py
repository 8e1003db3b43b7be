"""Progress bars that show epsilon, in a terminal and in a notebook, and bars whose clock goes on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import logging


# How often a bar shows that work goes on, in seconds.
_REFRESHED_EVERY = 2.0


# A bar that shows shares alone, in steps so wide that they do not tell how many there are of what is done.
_SHARES = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
_SHARE = 5


class RowBar:
    """A bar whose clock goes on while rows are read. It counts them, or shows the share of them that is done.

    Args:
        bar: the bar, of all rows if they are counted, or else of 100.
        total: the number of rows.
        is_counted: whether it shows their number.
    """

    def __init__(self, bar: Any, *, total: int, is_counted: bool) -> None:
        self._bar, self._total, self._is_counted = bar, total, is_counted
        self._done = 0
        self._shown = time.monotonic()

    def update(self, count: int) -> None:
        """Say that `count` more rows are done."""
        self._done += count
        shown = self._done if self._is_counted else 100 * self._done // self._total // _SHARE * _SHARE
        if shown > self._bar.n:
            self._bar.update(shown - self._bar.n)

    def refresh(self) -> None:
        """Show the bar again with its clock, and the same number, if it has not been shown lately."""
        if time.monotonic() - self._shown >= _REFRESHED_EVERY:
            self._bar.refresh()
            self._shown = time.monotonic()


@contextmanager
def row_bar(description: str, total: int, *, is_counted: bool, is_hidden: bool) -> Iterator[RowBar]:
    """Show a bar of `total` rows inside the context."""
    form = {"total": total, "unit": "row"} if is_counted else {"total": 100, "bar_format": _SHARES}
    with logging.tqdm(desc=description, disable=is_hidden, **form) as bar:
        yield RowBar(bar, total=total, is_counted=is_counted)


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
