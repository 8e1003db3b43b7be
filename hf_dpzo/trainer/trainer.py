"""`ZOTrainer`: the stock Trainer, with the training step of differentially private zeroth-order optimization.

Only hooks are overridden. One step is `training_step` below, followed by the stock loop's `optimizer.step()`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel
from transformers.trainer_utils import TrainOutput

from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.auditing.audit import Audit, audit_or_raise
from hf_dpzo.card.model_card import PRIVATE_TAGS, TAGS
from hf_dpzo.data.checks import check_probe_rows
from hf_dpzo.data.collation import LogicalBatch, LogicalBatchCollator
from hf_dpzo.data.padding import PaddingCollator
from hf_dpzo.data.sampling import build_batch_sampler
from hf_dpzo.data.suffix import SuffixRule
from hf_dpzo.distributed.processes import get_processes, refuse_diverged
from hf_dpzo.losses.heads import find_written_fields
from hf_dpzo.losses.per_example import PerExampleLoss
from hf_dpzo.models.activation import find_invocation
from hf_dpzo.models.feature_config import find_beginning
from hf_dpzo.models.precision import skipped_stock_validation
from hf_dpzo.models.unwrap import Inputs, unwrap_model
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.trainer.activation import refuse_missing_invocation
from hf_dpzo.trainer.checks import (
    refuse_changed_arguments,
    refuse_differing_settings,
    refuse_parts,
    refuse_replaced_parts,
)
from hf_dpzo.trainer.evaluation import refuse_missing_generation
from hf_dpzo.trainer.overrides import select_arguments
from hf_dpzo.trainer.progress import show_epsilon
from hf_dpzo.trainer.rehearsing import RehearsingTrainer
from hf_dpzo.trainer.reporting import FailedRows, load_report, mark_failed_units, release_report
from hf_dpzo.trainer.trackers import refuse_missing_trackers
from hf_dpzo.zo.walk import Stop, Walk


# The number of steps between two checks that all processes still hold the same weights.
CHECKED_EVERY = 100


class ZOTrainer(RehearsingTrainer):
    """A drop-in for `transformers.Trainer` that trains privately and without backpropagation.

    Takes what the Trainer takes, and:

    Args:
        args: `ZOTrainingArguments`.
        per_example_loss: a `PerExampleLoss`, or any function `(model, inputs) -> [batch]`, differentiable or not.
            Defaults to the loss of the model's head.
        probe_rows: two or more public rows in the format of `train_dataset`, which show before training whether the
            rows of a batch are kept apart. By default rows are made up.
        others: arguments of a Trainer that this class is combined with, such as `peft_config` of TRL's SFTTrainer.

    Guarantee: all that outlives a step is a function of `Mechanism.release`; `budget` holds the ledger of releases.

    Raises:
        ValueError: an argument would break that guarantee; raised before any data are touched.
    """

    # What the last run released about failing rows.
    failed_rows: FailedRows | None = None

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
        refuse_missing_generation(self, args)
        refuse_missing_trackers(args)
        refuse_replaced_parts(compute_loss_func, optimizers, others.get("optimizer_cls_and_kwargs"))
        self._join(args, train_dataset, own_loss=per_example_loss is not None)
        refuse_parts(dataset=train_dataset, data_collator=data_collator, callbacks=callbacks or [], args=args)
        given = {
            "model": model,
            "args": args,
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        with skipped_stock_validation():
            super().__init__(**select_arguments(self, given), **self._complete_arguments(model, others, args))
        if data_collator is None and type(self.data_collator) is DataCollatorWithPadding:
            self.data_collator = PaddingCollator(self.processing_class)
        self._refuse_model()
        self.per_example_loss = self._build_loss(per_example_loss)
        self._attach_objective(data_collator)
        self.probe_rows = self._prepare_probe_rows(check_probe_rows(probe_rows))
        self._processes = get_processes(args.device)
        # The rows are those that were passed, or what a class that is combined with this one made of them.
        self._units = args.build_units(self.train_dataset)
        self._num_units = len(self._units)
        self._plan_run()
        self._metric_prefixes = {"eval", "test"}
        self._audit: Audit | None = None
        show_epsilon(self)
        if isinstance(unwrap_model(self.model), PreTrainedModel):
            # PEFT rewrites the tags of a card from the model's own whenever an adapter is saved.
            unwrap_model(self.model).add_model_tags(list(PRIVATE_TAGS if args.private else TAGS))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Release one step and hand it to the optimizer; return zero, because the loss is not released."""
        self.budget.require_steps()
        self._refuse_changed_training(model)
        model.eval()
        step = len(self.budget.ledger)
        descent = self._build_descent()
        batch = inputs["batch"]
        if step % CHECKED_EVERY == 0:
            refuse_diverged(self._processes, descent.optimizer.parameters(), step)
        with self._sealed_apart_from_steps(), descent.walk(step, points_per_pass=self._points_per_pass) as walk:
            losses = self._evaluate_walk(walk, model, batch)
            coefficients = self._estimate.coefficients(losses, batch, descent.estimator(step))
            record = functools.partial(self._record_release, descent, step)  # On disk before any process learns of it.
            release = self.method.mechanism.release(coefficients, self._processes, record)
            del inputs, batch, losses, coefficients  # What follows is post-processing.
            descent.optimizer.receive(step=step, coefficients=release.coefficients)
        return torch.zeros((), device=self.args.device)

    def _evaluate_walk(self, walk: Walk, model: torch.nn.Module, batch: LogicalBatch) -> list[torch.Tensor]:
        """Return the losses at all stops of `walk`, in their order, each `[rows, points]`."""
        losses = []
        for part in self._estimate.divide(batch, walk):
            with self._estimate.share_work(part):
                losses.append([self._evaluate_stop(stop, model, part) for stop in walk])
        return [torch.cat(parts) for parts in zip(*losses, strict=True)]

    def _evaluate_stop(self, stop: Stop, model: torch.nn.Module, batch: LogicalBatch) -> torch.Tensor:
        """Return the losses at `stop`; raise `ModelChangedError` if evaluating them changed a weight."""
        with self._state.held_still(stop.checksums):
            return self._estimate.evaluate(stop, model, batch)

    def get_train_dataloader(self) -> DataLoader:
        """Return stock's data loader with Poisson batches: one item is one logical batch, split into micro-batches."""
        self._refuse_model()  # Again, because `model_init` may have created a new one since.
        stock = super().get_train_dataloader()
        self._refuse_rows(stock.dataset)
        self._collator = LogicalBatchCollator(
            collate=stock.collate_fn,
            micro_batch_size=self._train_batch_size,
            padded_lengths=tuple(self.args.padded_lengths or ()),
            written_fields=find_written_fields(self.model),
            suffix_rule=self._find_suffix_rule(),
            beginning_length=len(find_beginning(self.model)),
        )
        rows = self._encode_rows(stock.dataset)
        refuse_missing_invocation(self.model, rows)
        self._public_batches = self._build_public_batches(rows)
        rate = self.args.sampling_rate(self._num_units)
        loader = DataLoader(
            self._seal_rows(rows),
            batch_sampler=build_batch_sampler(self._units, rate, self._processes, capacity=self._batch_capacity),
            collate_fn=self._collator,
            num_workers=stock.num_workers,
            pin_memory=stock.pin_memory,
            worker_init_fn=stock.worker_init_fn,
            persistent_workers=stock.persistent_workers,
            prefetch_factor=stock.prefetch_factor,
            multiprocessing_context=stock.multiprocessing_context,
        )
        self._loader = self._tabulate(loader)
        return self._loader

    def _find_suffix_rule(self) -> SuffixRule | None:
        """Return the rule by which rows are evaluated from an invocation on; `None` if the loss needs whole rows."""
        invocation, loss = find_invocation(self.model), self.per_example_loss
        continues = invocation is not None and loss.can_continue
        return SuffixRule(invocation=invocation, ends_together=loss.reads_end) if continues else None

    def create_accelerator_and_postprocess(self) -> None:
        """Set up as stock does, without a gradient scaler, and without DDP, whose buckets no gradient would fill."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.scaler = None

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Train as stock does. Once training ends, even early, all planned steps count as spent.

        Args:
            resume_from_checkpoint: `True`, or the path of a checkpoint, to resume the run in `output_dir`. The steps in
                its log are replayed without data; the remaining ones follow, with fresh noise and batches.
            trial: a trial of a search, which only `hyperparameter_search` passes.
            ignore_keys_for_eval: see stock.

        Returns:
            the number of steps, NaN in place of the loss, which is not released, the epsilon of a private run, and the
            noisy share of failing rows if `report_failed_rows` pays for it.

        Raises:
            TrajectoryError: there is no run to resume, or it is another one; the message says what differs.
            BudgetExceededError: this trainer has trained before.
        """
        if self.budget is None:
            raise ValueError("train_dataset=None: training needs rows; pass train_dataset.")
        self._begin_trial(trial)
        refuse_differing_settings(self._processes, self.args)
        refuse_changed_arguments(self.args, self._planned_values)
        self._find_log(resume_from_checkpoint or False)
        try:
            self._refuse_changes(resumes=bool(resume_from_checkpoint))
            if self.args.audit and not self._is_rehearsing:
                method, _ = self.args.plan(self._num_units)
                self._audit = self._processes.run_on_first(lambda: audit_or_raise(method, seed=self.args.seed))
            output = super().train(self._log.checkpoint, trial, ignore_keys_for_eval=ignore_keys_for_eval)
            self._refuse_broken_seal()
            refuse_diverged(self._processes, self._build_descent().optimizer.parameters(), output.global_step)
            ends_here = self._log.num_spent_steps < self.budget.planned_steps <= output.global_step
            self.failed_rows = self._report_failed_rows(may_release=ends_here)
        finally:
            self._close_log()
        metrics = {"epoch": self.state.epoch}
        if self.args.private:
            metrics["epsilon"] = round_up(self.budget.guarantee().epsilon)
        if self.failed_rows is not None:
            metrics["failed_rows"] = self.failed_rows.share
        return TrainOutput(output.global_step, math.nan, metrics)

    def _report_failed_rows(self, *, may_release: bool) -> FailedRows | None:
        """Release the share of units on which training fails, from one more batch; `None` if no budget is set aside.

        Args:
            may_release: whether the run's last step was taken here. If not, the count comes then, or has come.
        """
        if not self.budget.report:
            return None
        folder = Path(self.args.output_dir)
        if not may_release:
            return self._processes.run_on_first(lambda: load_report(folder))
        batch = next(iter(self._loader))["batch"]
        self.model_wrapped.eval()
        with self._state.held_still():
            failed = mark_failed_units(self._estimate.losses(self.model_wrapped, batch), batch)
        if self.args.parallel == "points" and not self._processes.is_first:
            failed = failed[:0]  # All processes have the same batch, and one of them counts.
        (query, _), *_ = self.budget.report
        size = self.args.resolve_batch_size(self._num_units)
        report = release_report(failed, query, expected_batch_size=size, processes=self._processes)
        self._processes.run_on_first(lambda: report.save(folder))
        return report
