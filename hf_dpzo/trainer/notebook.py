"""The table that a notebook shows of a run. Importing this needs IPython."""

from typing import Any

from IPython.display import HTML, display
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker, text_to_html_table

from hf_dpzo.trainer.evaluation import SPEED_METRICS


class EpsilonTracker(NotebookTrainingTracker):
    """The stock table, with the last logged epsilon in place of the training loss, which is never shown."""

    epsilon: float | str = ""

    def write_line(self, values: dict[str, Any]) -> None:
        """Write a line as stock does."""
        shown = {name: value for name, value in values.items() if name != "Training Loss"}
        super().write_line({**shown, "Epsilon": self.epsilon})


class EpsilonNotebookCallback(NotebookProgressCallback):
    """The stock progress of a notebook, whose table shows epsilon."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a table as stock does, with other columns."""
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker = EpsilonTracker(state.max_steps, [self.first_column, "Epsilon"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the logged epsilon, and write a line unless there is one for each evaluation."""
        if self.training_tracker is None or logs is None or "epsilon" not in logs:
            return
        self.training_tracker.epsilon = logs["epsilon"]
        if args.eval_strategy == IntervalStrategy.NO:
            self.training_tracker.write_line({"Step": state.global_step})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show metrics as stock does, but outside training in a table without the training loss."""
        if self.training_tracker is not None:
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            return
        shown = {name: value for name, value in (metrics or {}).items() if not name.endswith(SPEED_METRICS)}
        display(HTML(text_to_html_table([[*shown], [*shown.values()]])))
        self.prediction_bar = None
