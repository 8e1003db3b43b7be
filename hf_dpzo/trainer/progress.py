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


# How a bar shows shares alone.
SHARES = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


# Shares in percent that are shown: so few of them do not tell how many there are of what is done.
_SHARE = 5


class RowBar:
    """A bar whose clock goes on while rows are read, and that says how many parts of `parts` are done.

    Args:
        bar: the bar, of all parts. Where bars are hidden it is one of transformers that knows no number.
        rows: the number of rows.
        parts: the number of parts.
        step: the number of parts by which the bar moves.
    """

    def __init__(self, bar: Any, *, rows: int, parts: int, step: int) -> None:
        self._bar, self._rows, self._parts, self._step = bar, rows, parts, step
        self._read = self._done = 0
        self._shown = time.monotonic()

    def update(self, count: int) -> None:
        """Say that `count` more rows are read."""
        self._read += count
        done = self._parts * self._read // self._rows // self._step * self._step
        self._bar.update(done - self._done)
        self._done = done

    def refresh(self) -> None:
        """Show the bar again with its clock, and the same number, if it has not been shown lately."""
        if time.monotonic() - self._shown >= _REFRESHED_EVERY:
            self._bar.refresh()
            self._shown = time.monotonic()


@contextmanager
def row_bar(description: str, rows: int, *, is_counted: bool, is_hidden: bool) -> Iterator[RowBar]:
    """Show a bar of `rows` inside the context, which counts them, or else shows the share of them that is read."""
    parts, step, form = (rows, 1, {"unit": "row"}) if is_counted else (100, _SHARE, {"bar_format": SHARES})
    with logging.tqdm(desc=description, total=parts, disable=is_hidden, **form) as bar:
        yield RowBar(bar, rows=rows, parts=parts, step=step)


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
