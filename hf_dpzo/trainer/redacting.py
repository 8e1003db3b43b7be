"""The stock Trainer, made discreet: it shows and keeps only released and public values.

What the stock loop knows about training (losses, sizes and counts) is a function of unreleased data.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from hf_dpzo.data.sampling import SealedRows
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.losses.per_example import PerExampleLoss, Scores
from hf_dpzo.models.activation import rows_apart
from hf_dpzo.models.state import ModelState
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.trainer.evaluation import LossForward


# The values that the stock loop may log about training.
LOGGABLE_KEYS = frozenset({"epoch", "learning_rate", "step", "epsilon"})


class RedactingTrainer(Trainer):
    """A Trainer whose logs, metrics, checkpoints and streams say nothing about training data.

    Subclasses set what evaluation needs: `per_example_loss`, `budget`, and the prefixes of its metrics; and the number
    of units of privacy.
    """

    per_example_loss: PerExampleLoss
    budget: Budget | None
    _num_units: int
    _metric_prefixes: set[str]

    # ---- What leaves ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, as stock does, metrics of evaluations, public values and the epsilon spent.

        All other values in `logs` are dropped.
        """
        logs = self._redact(logs)
        if "learning_rate" in logs and self.args.private:
            logs["epsilon"] = round_up(self.budget.running_epsilon())
        super().log(logs, start_time)

    def _redact(self, logs: dict[str, Any]) -> dict[str, Any]:
        evaluated = tuple(f"{prefix}_" for prefix in self._metric_prefixes)
        return {key: value for key, value in logs.items() if key in LOGGABLE_KEYS or key.startswith(evaluated)}

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the expected batch size, because actual sizes are secret."""
        return args.resolve_batch_size(self._num_units)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return what stock does, but for training data the number of units, because stock prints it.

        The number of rows of all users together would tell how many rows a user has.
        """
        is_training = isinstance(dataloader.dataset, SealedRows)
        return self._num_units if is_training else super().num_examples(dataloader)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return zero, because the count would tell how many tokens were drawn."""
        return 0

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """Return `None`, which is not logged, because there is no gradient."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Save nothing: a resumed run draws nothing again, and a generator's position would count what was drawn."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load nothing, because batches and noise are fresh, and directions need no state."""

    # ---- Evaluation ----

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean of the per-example losses, for evaluation. Training never calls this."""
        if not return_outputs:
            return self.per_example_loss(model, inputs).mean()
        losses, scores = self.per_example_loss.evaluate(model, inputs)
        return losses.mean(), {"logits": scores}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
        **options: Any,
    ) -> tuple:
        """Predict as stock does, by the per-example loss and its scores.

        Where only losses are wanted, or there are no scores, only losses are evaluated. Rows without labels are scored
        in the same way as labelled ones. Texts are generated if this class is combined with `Seq2SeqTrainer`.
        """
        if not prediction_loss_only and self._predicts_texts:
            forward = LossForward(lambda given: self.compute_loss(model, given))
            # A collator of sequence to sequence gives None to rows without labels, and stock asks for its length.
            inputs = {name: value for name, value in inputs.items() if value is not None}
            return super().prediction_step(forward, inputs, prediction_loss_only, ignore_keys, **options)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self._evaluate_batch(model, inputs, prediction_loss_only)
        if prediction_loss_only:
            return loss, None, None
        return loss, nested_detach(scores), self._read_labels(inputs)

    @property
    def _predicts_texts(self) -> bool:
        """Whether predictions are texts that `Seq2SeqTrainer` generates."""
        return getattr(self.args, "predict_with_generate", False)

    def _read_labels(self, inputs: Mapping[str, Any]) -> Any:
        """Return the labels that metrics are computed from, several in a tuple; `None` without any."""
        labels = nested_detach(tuple(inputs[name] for name in self.label_names if inputs.get(name) is not None))
        return labels[0] if len(labels) == 1 else labels or None

    def _evaluate_batch(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool
    ) -> tuple[torch.Tensor | None, Scores | None]:
        """Return the mean loss, `None` without labels that it needs, and the scores, `None` unless they are wanted."""
        has_labels = any(inputs.get(name) is not None for name in self.label_names)
        try:
            # A function may need no labels. Others would take rows without labels for mistaken ones.
            if has_labels or isinstance(self.per_example_loss, FunctionLoss):
                if prediction_loss_only:
                    return self.compute_loss(model, inputs), None
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                return loss, outputs["logits"]
        except KeyError as error:  # The function asked for labels, or for something else that is missing.
            if has_labels or not {*error.args} & {*self.label_names, "labels"}:
                raise
        return None, None if prediction_loss_only else self.per_example_loss.scores(model, inputs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **options: Any
    ) -> dict:
        """Evaluate as stock does, on data that are not the training data.

        Args:
            eval_dataset: see stock.
            ignore_keys: see stock.
            metric_key_prefix: see stock.
            options: arguments of generation, if this class is combined with `Seq2SeqTrainer`.
        """
        self._refuse_training_data(eval_dataset)
        if metric_key_prefix.startswith("train"):
            raise ValueError(f"metric_key_prefix={metric_key_prefix}: it names training metrics; choose another.")
        self._metric_prefixes.add(metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **options)

    def predict(
        self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test", **options: Any
    ) -> PredictionOutput:
        """Predict as stock does, on data that are not the training data. The arguments are those of `evaluate`."""
        self._refuse_training_data(test_dataset)
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate or predict as stock does; raise `ModelChangedError` if that changes a weight."""
        with ModelState(self.model, moving=()).held_still(), rows_apart(self.model):
            return super().evaluation_loop(*args, **options)

    def _refuse_training_data(self, dataset: Any) -> None:
        dataset = self.eval_dataset if dataset is None else dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if self.args.private and dataset is not None and dataset is self.train_dataset:
            raise ValueError(
                "eval_dataset: it is the training data, whose losses are not released; hold some rows out."
            )
