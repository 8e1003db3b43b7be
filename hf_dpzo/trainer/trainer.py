"""`ZOTrainer`: the stock Trainer, with the training step of differentially private zeroth-order optimization.

Nothing but hooks is overridden. One step is `training_step` below, followed by the stock loop's `optimizer.step()`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_utils import TrainOutput

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.arguments.unsupported import refuse_arguments
from hf_dpzo.auditing.audit import Audit, audit_or_raise
from hf_dpzo.card.declarations import versions
from hf_dpzo.card.model_card import PRIVATE_TAGS, TAGS
from hf_dpzo.data.checks import refuse_no_rows, refuse_other_rows, refuse_other_rows_read
from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.sampling import SealedRows, poisson_batches, room_for
from hf_dpzo.distributed.processes import processes, refuse_diverged
from hf_dpzo.isolation.bound import isolation_bound, isolation_of, refuse_bound
from hf_dpzo.isolation.measure import Rows, batches_to_probe, measured, moved_together
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.isolation.synthetic_rows import columns_of
from hf_dpzo.losses.per_example import PerExampleLoss, as_loss
from hf_dpzo.models.checks import refuse_model, refuse_padding, refuse_sharded, refuse_split
from hf_dpzo.models.precision import no_backward_needed, refuse_shapes
from hf_dpzo.models.unwrap import Inputs, unwrapped, unwrapped_optimizer
from hf_dpzo.privacy.ledger import round_up
from hf_dpzo.step.estimate import Evaluation
from hf_dpzo.step.fsdp import LockstepLosses, batch_losses
from hf_dpzo.trainer.callbacks import EpsilonProgressCallback
from hf_dpzo.trainer.checks import (
    refuse_changed,
    refuse_copies,
    refuse_other_settings,
    refuse_parts,
    refuse_replaced,
    refuse_resuming,
    refuse_trained,
)
from hf_dpzo.trainer.searching import SearchingTrainer
from hf_dpzo.trajectory.run import remembers


# Every so many steps, several processes see that they still hold the same weights.
CHECKED_EVERY = 100


class ZOTrainer(SearchingTrainer):
    """A drop-in for `transformers.Trainer` that trains privately and without backpropagation.

    Takes what the Trainer takes, and:

    Args:
        args: `ZOTrainingArguments`.
        per_example_loss: a `PerExampleLoss`, or any function `(model, inputs) -> [batch]`, differentiable or not.
            Defaults to the loss of the model's head.
        probe_rows: public rows of the format of `train_dataset`, two or more, which show before training whether the
            rows of a batch are kept apart. By default rows are made up.
        others: what the next class takes, where this one is joined with another one: `peft_config` of TRL's SFTTrainer.

    Guarantee: all that outlives a step is a function of `Mechanism.release`; `budget` holds the ledger of releases.

    Raises:
        ValueError: for whatever would break that, in one sentence, before any data are touched.
    """

    def __init__(
        self,
        model: Any = None,
        args: ZOTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        per_example_loss: PerExampleLoss | Callable[[torch.nn.Module, Inputs], torch.Tensor] | None = None,
        probe_rows: Sequence[Mapping[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(args, ZOTrainingArguments):
            raise ValueError(
                f"args={type(args).__name__}: ZOTrainer needs ZOTrainingArguments, which say what is private."
            )
        refuse_replaced(compute_loss_func, optimizers)
        refuse_parts(dataset=train_dataset, data_collator=data_collator, callbacks=callbacks or [], args=args)
        with no_backward_needed():
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                **({} if model_init is None else {"model_init": model_init}),  # SFTTrainer takes none.
                **others,
            )
        self._refuse_model()
        self.per_example_loss = as_loss(per_example_loss, self.model)
        self.probe_rows = refuse_no_rows(probe_rows)
        self._processes = processes(args.device)
        self._units = args.units(self.train_dataset)  # What was passed, or what another class made of it.
        self._num_units = len(self._units)
        self._plan()
        self._metric_prefixes = {"eval", "test"}
        self._isolation: Isolation | None = None
        self._audit: Audit | None = None
        if ProgressCallback in [type(callback) for callback in self.callback_handler.callbacks]:
            self.remove_callback(ProgressCallback)
            self.add_callback(EpsilonProgressCallback)
        if isinstance(unwrapped(self.model), PreTrainedModel):
            # PEFT rewrites the tags of a card from the model's own whenever an adapter is saved.
            unwrapped(self.model).add_model_tags(list(PRIVATE_TAGS if args.private else TAGS))

    # ---- One step ----

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Release one step and hand it to the optimizer; return zero, for the loss is not released."""
        self.budget.require()
        model.eval()
        step, descent = len(self.budget.ledger), self._descent()
        if step % CHECKED_EVERY == 0:
            refuse_diverged(self._processes, descent.optimizer.parameters(), step)
        batch = inputs["batch"]
        try:
            differences = self._evaluation(descent, step, model, batch)
            # On disk before any process learns of it.
            recorded = functools.partial(self._record, descent, step)
            release = self.method.mechanism.release(differences, self._processes, recorded)
            del inputs, batch, differences  # What follows is post-processing.
        except BaseException:
            descent.optimizer.settle()
            raise
        descent.optimizer.receive(step=step, coefficients=release.coefficients)
        return torch.zeros((), device=self.args.device)

    # ---- Hooks of the stock loop ----

    def create_accelerator_and_postprocess(self) -> None:
        """As stock, but without DDP, whose gradient buckets nothing would fill, and without a gradient scaler."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.scaler = None

    def get_train_dataloader(self) -> DataLoader:
        """As stock, with Poisson batches: one item is one logical batch, split into micro-batches."""
        self._refuse_model()  # Again: `model_init` has made a new one by now.
        stock = super().get_train_dataloader()
        refuse_other_rows_read(self.train_dataset, stock.dataset, self._units.num_rows)
        refuse_split(self.model, self.args, remembers=remembers(self.method, self.args.update_rule))
        refuse_other_rows(self._processes, stock.dataset, self._units)
        collator = LogicalBatchCollator(
            collate=stock.collate_fn,
            micro_batch_size=self._train_batch_size,
            padded_lengths=tuple(self.args.padded_lengths or ()),
        )
        made = {"loss": self.per_example_loss, "collator": collator, "prepare": self._prepare_inputs}
        self._losses = batch_losses(self.model, self._processes, **made, device=self.args.device)
        if isinstance(self._losses, LockstepLosses):
            self._losses.learn(self.model, self._public_batches(stock.dataset)[0])
        self._evaluation = Evaluation(
            losses=self._losses,
            processes=self._processes,
            room=self._room,
            points_per_pass=self.args.points_per_pass,
        )
        if self.args.private:
            self._isolation = self._probed(self._public_batches(stock.dataset))
        rate = self.args.sampling_rate(self._num_units)
        return DataLoader(
            SealedRows(stock.dataset, without=self.args.privacy_unit_column),
            batch_sampler=poisson_batches(self._units, rate, self._processes, room=self._room),
            collate_fn=collator,
            num_workers=stock.num_workers,
            pin_memory=stock.pin_memory,
            worker_init_fn=stock.worker_init_fn,
            persistent_workers=stock.persistent_workers,
            prefetch_factor=stock.prefetch_factor,
            multiprocessing_context=stock.multiprocessing_context,
        )

    @property
    def _room(self) -> int | None:
        """For how many rows there is room, where all processes have the same batch."""
        if self.args.parallel != "points":
            return None
        return room_for(self.args.expected_batch_size, max_rows=self._units.max_rows)

    def _public_batches(self, dataset: Any) -> list[Rows]:
        kept = {column.name for column in columns_of(dataset)} - {self.args.privacy_unit_column}
        kept &= set(self._signature_columns or kept)  # The others do not reach the collator.
        return batches_to_probe(dataset, self.model, self._losses.collator, kept=kept, public=self.probe_rows)

    def _probed(self, batches: list[Rows]) -> Isolation:
        """What public rows show about how far rows are kept apart. Raises where they are not far enough."""
        moved = measured(self.model, self._losses, batches).moved
        if self.args.points_per_pass is not None:
            points = min(self.args.points_per_pass, self.method.estimator.forward_passes)
            moved = max(moved, moved_together(self.model, self._losses, batches, points))
        found = Isolation(moved=self._processes.largest(moved))
        refuse_bound(isolation_bound(self.method, self.budget.planned_steps, found.moved))
        return found

    @property
    def _made_with(self) -> dict[str, Any]:
        found, steps = self._isolation, self.budget.planned_steps
        bound = None if found is None else isolation_bound(self.method, steps, found.moved)
        isolation = isolation_of(found, fixed_shapes=self._fixed_shapes, bound=bound)
        return {"isolation": isolation, "versions": versions()}

    @property
    def _fixed_shapes(self) -> bool:
        """Whether what a row is evaluated in depends on public things and on that row alone."""
        return self._train_batch_size == 1 or bool(self.args.padded_lengths)

    def get_total_train_batch_size(self, args: ZOTrainingArguments) -> int:
        """The expected batch size; the actual ones are secret."""
        return args.expected_batch_size

    def _get_learning_rate(self) -> float:
        """As stock, times the share of it that the method's present stage takes."""
        return super()._get_learning_rate() * unwrapped_optimizer(self.optimizer).rate_factor

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As stock. All planned steps count as spent when it ends, also when it is stopped early.

        Args:
            resume_from_checkpoint: go on with the run in `output_dir`: `True`, or one of its checkpoints. The steps in
                its log are replayed, without data; those that are left follow, with fresh noise and batches.
            trial: of a search, which `hyperparameter_search` makes.
            ignore_keys_for_eval: as stock.

        Raises:
            TrajectoryError: there is no run to go on with, or it is another one; the message says what differs.
            BudgetExceededError: when called again.
        """
        if self.budget is None:
            raise ValueError("train_dataset=None: training needs rows; pass train_dataset.")
        self._begin_trial(trial)
        refuse_other_settings(self._processes, self.args)
        self._find_log(resume_from_checkpoint or False)
        try:
            self._refuse_changes(resumes=bool(resume_from_checkpoint))
            if self.args.audit:
                method, _ = self.args.plan(self._num_units)
                self._audit = self._processes.by_first(lambda: audit_or_raise(method, seed=self.args.seed))
            output = super().train(self._log.checkpoint, trial, ignore_keys_for_eval=ignore_keys_for_eval)
            refuse_diverged(self._processes, self._descent().optimizer.parameters(), output.global_step)
        finally:
            self._close_log()
        metrics = {"epoch": self.state.epoch}
        if self.args.private:
            metrics["epsilon"] = round_up(self.budget.stated().epsilon)
        return TrainOutput(output.global_step, math.nan, metrics)

    def _refuse_model(self) -> None:
        refuse_sharded(self.model, self.args, distributed_type=self.accelerator.distributed_type.value)
        refuse_model(self.model, private=self.args.private)
        if self.args.private:
            refuse_shapes(self.model, fixed=self._fixed_shapes)
        refuse_padding(self.model, self.processing_class)
        refuse_copies(self.model, self.args.points_per_pass)

    def _refuse_changes(self, *, resumes: bool) -> None:
        """Refuse what was changed since the budget was planned, and what was added since the parts were checked."""
        refuse_arguments(self.args)
        refuse_changed(self.args, self._planned_values)
        parts = {"data_collator": self.data_collator, "callbacks": self.callback_handler.callbacks}
        refuse_parts(dataset=self.train_dataset, **parts, args=self.args)
        if resumes:
            refuse_resuming(self.args)
        elif self.args.private and self.model_init is None:
            refuse_trained(unwrapped(self.model))
