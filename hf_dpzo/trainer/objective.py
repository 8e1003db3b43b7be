"""The checking Trainer, for objectives without a gradient: columns reach the loss, and nothing flips by rounding."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_utils import EvalLoopOutput

from hf_dpzo.data.cutting import count_tokens
from hf_dpzo.isolation.measure import Rows, measure_isolation
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.isolation.watched import changes_in_jumps, watch_outputs
from hf_dpzo.losses.objective import COLUMNS, ColumnsCollator, EncodedRows, TextObjective
from hf_dpzo.losses.output_layer import IGNORE_INDEX
from hf_dpzo.losses.per_example import PerExampleLoss, ScoreLoss, Scores
from hf_dpzo.models.unwrap import unwrap_optimizer
from hf_dpzo.privacy.limits import RunLimits
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.fsdp import FSDPLosses
from hf_dpzo.trainer.activation import foresee_activation
from hf_dpzo.trainer.checking import CheckingTrainer
from hf_dpzo.trainer.evaluation import list_evaluated
from hf_dpzo.trainer.limits import (
    SEEN_AMONG,
    SEEN_ROWS,
    TRIED_DIRECTIONS,
    find_limits,
    measure_quotients,
    report_limits,
    warn_of_both_factors,
    warn_of_drowned_adapter,
    warn_of_flat_objective,
)
from hf_dpzo.zo.shift import shifted


# The number of public rows that the probe follows, and of those that an objective is tried on.
PROBED_ROWS = 8
TRIED_ROWS = 16


class ObjectiveTrainer(CheckingTrainer):
    """A checking Trainer for losses that read a row's columns, and for losses that change in jumps."""

    per_example_loss: PerExampleLoss
    # What limits the run, and what the rows were by which that was found.
    _limits: tuple[RunLimits, str] | None = None

    def _attach_objective(self, data_collator: Callable | None) -> None:
        """Tell the loss what the trainer knows; for a loss of texts, collate columns too.

        Args:
            data_collator: the user's collator; `None` for the default one.
        """
        self.per_example_loss.attach(self.model, self.processing_class, self._copy_progress)
        if isinstance(self.per_example_loss, TextObjective):
            self.data_collator = ColumnsCollator(self.per_example_loss.encode, self.model, data_collator)

    def _copy_progress(self) -> TrainerState:
        """Return a new state of training, in which a user's function cannot leave anything."""
        state = self.state
        return TrainerState(epoch=state.epoch, global_step=state.global_step, max_steps=state.max_steps)

    # ---- Rows ----

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Remove columns as stock does, but none that the loss may read."""
        if isinstance(self.per_example_loss, TextObjective):
            return dataset
        return super()._remove_unused_columns(dataset, description=description)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        """Return stock's collator, or one that removes no column where the loss may read it."""
        if isinstance(self.per_example_loss, TextObjective):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description=description)

    def _encode_rows(self, dataset: Any) -> Any:
        """Return the rows as the collator receives them: where a loss reads texts, with the tokens of prompts."""
        if isinstance(self.per_example_loss, TextObjective):
            return EncodedRows(dataset, self.per_example_loss.encode)
        return dataset

    def _build_public_batches(self, dataset: Any) -> list[Rows]:
        """Return batches of public rows; for a loss of texts, the user's own or public ones of the evaluation."""
        public = self._list_public_rows(PROBED_ROWS)
        if isinstance(self.per_example_loss, TextObjective) and len(public) > 1:
            return [public]
        return super()._build_public_batches(dataset)

    def _list_public_rows(self, count: int) -> Rows:
        """Return at most `count` real rows that are public, as training would receive them; none if there are none."""
        if self.probe_rows is not None:
            rows: Any = self.probe_rows
        elif self.args.eval_data_is_public and self.eval_dataset is not None:
            named = isinstance(self.eval_dataset, dict)
            rows = next(iter(self.eval_dataset.values())) if named else self.eval_dataset
        else:
            return []
        longest = max(self.args.padded_lengths or (), default=None)
        encoded = self._encode_rows(rows)
        usable = (dict(encoded[index]) for index in range(len(encoded)))
        fitting = (row for row in usable if longest is None or count_tokens(row) <= longest)
        column = self.args.privacy_unit_column
        return [{name: row[name] for name in row if name != column} for row in islice(fitting, count)]

    # ---- Checks ----

    def _inspect(self, model: torch.nn.Module) -> None:
        """Inspect the model, and warn where public rows show an objective from which nothing could be learned."""
        super()._inspect(model)
        with self._state.held_still():
            if not isinstance(self.per_example_loss, ScoreLoss):
                self._warn_of_flat_objective(model)
            if self.args.private and self._log.existing is None:
                self._measure_limits(model)
                self._report_limits()
        if self._log.existing is None and self.is_world_process_zero():
            warn_of_both_factors(self.model)

    def _foresee_failures(self, model: torch.nn.Module, losses: BatchLosses) -> None:
        """Refuse what would fail, and before that an activated adapter that nothing would activate."""
        if not isinstance(losses, FSDPLosses):  # All processes would have to fail together.
            are_public = self.args.eval_data_is_public or not self.args.private
            # Rows that are made up hold what activates an adapter.
            tried = "eval_dataset" if self.probe_rows is None else "probe_rows"
            named = [(tried, rows) for rows in self._public_batches[:1]]
            foresee_activation(
                model,
                losses,
                self._public_batches,
                named_rows=named + list(list_evaluated(self).items() if are_public else ()),
                padding_token=getattr(self.processing_class, "pad_token_id", None),
                num_beams=getattr(self.args, "generation_num_beams", None),
            )
        super()._foresee_failures(model, losses)

    def _measure_isolation(self, model: torch.nn.Module, losses: BatchLosses, batches: list[Rows]) -> Isolation:
        """Return how far public rows move each other's losses; refuse what may flip by rounding.

        Raises:
            CoupledRowsError: rows move each other's losses too far.
            ValueError: a loss changes in jumps, and a row's neighbours decide how its model's outputs are rounded.
        """
        jumps = self.per_example_loss.is_piecewise_constant
        if jumps is None:
            isolation = super()._measure_isolation(model, losses, batches)
            if not self._changes_in_jumps(model, losses, batches):
                return isolation
        self._refuse_flips()
        watched = measure_isolation(model, watch_outputs(losses), batches)
        if self._processes.all_reduce_max(watched.loss_change):
            raise ValueError(
                f"per_device_train_batch_size={self._train_batch_size}: this objective changes in jumps, and on public "
                "rows neighbours moved the model's outputs by rounding, which may flip a token or a class; set "
                "per_device_train_batch_size=1."
            )
        return watched

    def _changes_in_jumps(self, model: torch.nn.Module, losses: BatchLosses, batches: list[Rows]) -> bool:
        """Return whether losses of public rows stay where they are while weights move a little."""
        return changes_in_jumps(model, losses, batches)

    def _refuse_flips(self) -> None:
        """Raise `ValueError` where a row's neighbours choose the shapes in which its outputs are computed."""
        if not self._has_fixed_shapes:
            raise ValueError(
                f"per_device_train_batch_size={self._train_batch_size}: this objective changes in jumps, and where "
                "neighbours choose the shape in which a row is evaluated, rounding may flip a token or a class; set "
                "padded_lengths, or per_device_train_batch_size=1."
            )
        if self._points_per_pass is not None:
            raise ValueError(
                f"points_per_pass={self._points_per_pass}: this objective changes in jumps, and of several points at "
                "once nobody can tell whether rounding may flip a token or a class; remove it."
            )

    def _warn_of_flat_objective(self, model: torch.nn.Module) -> None:
        """Warn where an objective has one value on public rows, or the same ones at the probe points of a step."""
        rows = self._list_collated_rows(TRIED_ROWS)
        if not rows:
            return
        optimizer = unwrap_optimizer(self.optimizer)
        trained = dict(enumerate(optimizer.parameters()))
        smoothing = self._build_descent().begin(len(self.budget.ledger)).smoothing
        here = self._public_losses.of_public(model, rows)
        moves = False
        for direction in range(TRIED_DIRECTIONS):
            ends = []
            for distance in (smoothing, -smoothing):
                with shifted(trained, optimizer.directions, {direction: distance}):
                    ends.append(self._public_losses.of_public(model, rows))
            moves = moves or not torch.equal(*ends)
        warn_of_flat_objective(here, moves=moves, smoothing=smoothing)

    def _measure_limits(self, model: torch.nn.Module) -> None:
        """Find what limits the run: rows, directions, epsilon or the clip norm, by public rows and public numbers."""
        if isinstance(self.per_example_loss, TextObjective) or isinstance(self._public_losses, FSDPLosses):
            return  # What is told of an objective is told above, and all processes would have to take part.
        descent = self._build_descent()
        settings: dict[str, Any] = {"smoothing": descent.begin(0).smoothing}
        trained = dict(enumerate(descent.optimizer.parameters()))
        try:
            real = self._list_collated_rows(SEEN_AMONG)
            rows = real[:: max(1, len(real) // SEEN_ROWS)][:SEEN_ROWS] or [*chain(*self._public_batches)][:SEEN_ROWS]
            settings["evaluate"] = self._prepare_public(model, rows)
            measure = partial(measure_quotients, directions=descent.optimizer.directions, **settings)

            def spread(moved: Mapping[int, torch.Tensor]) -> float:
                return float(measure(moved).square().mean().sqrt())

            with nullcontext() if self._shared is None else self._shared.remembering():
                quotients = measure(trained)
                if not self.args.perturbation_scales and self.is_world_process_zero():
                    warn_of_drowned_adapter(self.model, trained, spread)
        except Exception:  # Nothing says that made-up rows suit a loss, and a hint is no reason to stop.
            return
        plan = {"sampling_rate": self.args.sampling_rate(self._num_units), "steps": self.budget.planned_steps}
        limits = None if quotients is None else find_limits(quotients, self.method, **plan)
        if limits is not None:
            self._limits = limits, f"{len(rows)} {'public' if real else 'made-up'} rows"

    def _report_limits(self) -> None:
        """Say what limits the run, if that was found."""
        if self._limits is not None and self.is_world_process_zero():
            limits, rows = self._limits
            report_limits(limits, self.args, self.method, rows=rows, num_units=self._num_units)

    def _prepare_public(self, model: torch.nn.Module, rows: Rows) -> Callable[[], torch.Tensor]:
        """Return a function that evaluates public `rows` where the parameters are, `[rows]`."""
        return partial(self._public_losses.of_public, model, rows)

    def _list_collated_rows(self, count: int) -> Rows:
        """Return real public rows with the columns that reach the collator."""
        rows = self._list_public_rows(count)
        if isinstance(self.per_example_loss, TextObjective):
            return rows
        kept = set(self._signature_columns or ())
        return [{name: row[name] for name in row if not kept or name in kept} for row in rows]

    # ---- Evaluation ----

    def _evaluate_batch(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool
    ) -> tuple[torch.Tensor | None, Scores | None]:
        """Return the mean loss and the scores; where the loss is one of texts, these are generated once.

        A row that has no reward counts as zero, as in training.
        """
        if not isinstance(self.per_example_loss, TextObjective):
            return super()._evaluate_batch(model, inputs, prediction_loss_only)
        losses, tokens = self.per_example_loss.evaluate(model, inputs)
        return losses.nan_to_num(0.0).mean(), tokens

    @property
    def _predicts_texts(self) -> bool:
        """Whether predictions are texts that `Seq2SeqTrainer` generates. A loss of texts generates them itself."""
        return super()._predicts_texts and not isinstance(self.per_example_loss, TextObjective)

    def _read_labels(self, inputs: Mapping[str, Any]) -> Any:
        """Return the labels, which a loss of texts has among the columns of a row."""
        if not isinstance(self.per_example_loss, TextObjective):
            return super()._read_labels(inputs)
        return _stack_labels(inputs[COLUMNS])

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate or predict as stock does, and name the mean reward, which is the negative loss."""
        output = super().evaluation_loop(*args, **options)
        if isinstance(self.per_example_loss, TextObjective):
            losses = {name: value for name, value in output.metrics.items() if name.endswith("_loss")}
            output.metrics.update({f"{name.removesuffix('_loss')}_reward": -value for name, value in losses.items()})
        return output


def _stack_labels(columns: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
    """Return the labels of rows, padded with -100, `[batch, ...]`; `None` if the rows have none."""
    if not all(row.get("labels") is not None for row in columns):
        return None
    labels = [torch.as_tensor(row["labels"]) for row in columns]
    longest = max(label.shape[-1] if label.ndim else 0 for label in labels)
    pad = torch.nn.functional.pad
    return torch.stack(
        [pad(label, (0, longest - len(label)), value=IGNORE_INDEX) if label.ndim else label for label in labels]
    )
