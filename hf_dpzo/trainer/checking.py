"""The searching Trainer, made careful: it refuses what would break the guarantee before it evaluates private rows."""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from hf_dpzo.arguments.unsupported import refuse_arguments
from hf_dpzo.card.declarations import collect_versions
from hf_dpzo.data.checks import refuse_changed_rows, refuse_differing_rows, refuse_rows
from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.data.sampling import batch_capacity
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.frozen.shared import SharedWork
from hf_dpzo.isolation.bound import (
    count_reached_rows,
    describe_isolation,
    isolation_bound,
    refuse_weak_isolation,
    worst_isolation,
)
from hf_dpzo.isolation.measure import Rows, build_probe_batches, list_columns, measure_isolation, try_stacked
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.isolation.trace import iterate_tensors
from hf_dpzo.models.adapters import refuse_unsaved_parameters
from hf_dpzo.models.checks import (
    refuse_left_padding,
    refuse_model,
    refuse_sharded_parameters,
    refuse_unsupported_sharding,
)
from hf_dpzo.models.float32_residual import keep_residual_in_float32
from hf_dpzo.models.precision import forget_unpacked_quantizer, refuse_variable_shapes
from hf_dpzo.models.state import checksum_each
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.step.assemble import assemble_estimate
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.estimate import StepEstimate
from hf_dpzo.step.fsdp import FSDPLosses
from hf_dpzo.step.sharing import find_shared_work
from hf_dpzo.trainer.caching import build_frozen_cache
from hf_dpzo.trainer.checks import refuse_large_copies, refuse_parts, refuse_resuming, refuse_trained_model
from hf_dpzo.trainer.evaluation import list_evaluated, try_public_evaluation
from hf_dpzo.trainer.foreseeing import (
    find_public_length,
    refuse_failing_rows,
    refuse_missing_positions,
    refuse_missing_targets,
    refuse_undeclared_classes,
    refuse_unknown_tokens,
    warn_of_rows_alone,
)
from hf_dpzo.trainer.searching import SearchingTrainer
from hf_dpzo.trainer.trying import choose_tried_rows, read_first_rows
from hf_dpzo.trajectory.run import describe_device, is_stateful


class CheckingTrainer(SearchingTrainer):
    """A searching Trainer that checks its model, its parts and its environment before it trains.

    Subclasses set the processes, the collator, the public batches, and `probe_rows` where the user passes public rows.
    """

    probe_rows: Sequence[Mapping[str, Any]] | None
    _processes: Processes
    _isolation: Isolation | None = None
    # The largest number of tokens of a row, if it is public; 0 if it is not known.
    longest_row: int = 0
    # The tokens that each row ends with, if that is public.
    row_ending: tuple[int, ...] = ()
    # The data loader that draws Poisson batches.
    _loader: DataLoader | None = None
    _shared: SharedWork | None = None
    # What evaluates batches, the collator that builds them, and batches of public rows.
    _estimate: StepEstimate
    _collator: LogicalBatchCollator
    _public_batches: list[Rows]
    # The first training rows of a run without privacy.
    _first_rows: Rows = ()

    def _refuse_model(self) -> None:
        """Raise `ValueError` for a model that cannot be trained, or that does not keep rows apart."""
        forget_unpacked_quantizer(self.model)
        keep_residual_in_float32(self.model)
        refuse_unsupported_sharding(self.model, self.args, distributed_type=self.accelerator.distributed_type.value)
        refuse_unsaved_parameters(self.model)
        refuse_model(self.model, private=self.args.private)
        if self.args.private:
            refuse_variable_shapes(self.model, fixed=self._has_fixed_shapes)
        refuse_left_padding(self.model, self.processing_class)
        refuse_large_copies(self.model, self.args.points_per_pass)

    def _refuse_rows(self, dataset: Any) -> None:
        """Raise `ValueError` unless the rows about to be read are the planned ones, and the same in all processes."""
        refuse_rows(dataset, private=self.args.private, unit_column=self.args.privacy_unit_column)
        units = self.args.build_units(dataset)  # Of the very rows that are read, whatever became of those given.
        refuse_changed_rows(self.train_dataset, dataset, planned_units=self._units, read_units=units)
        refuse_sharded_parameters(self.model, self.args, is_stateful=is_stateful(self.method, self.args.update_rule))
        refuse_differing_rows(self._processes, dataset, self._units)
        refuse_unknown_tokens(self.model, self.processing_class)
        refuse_undeclared_classes(self.model, dataset)
        refuse_missing_targets(dataset)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Remove columns as stock does, but from training rows not the one that says whose they are.

        The units are built from it again when training begins. It does not reach the collator.
        """
        column = self.args.privacy_unit_column
        if description != "Training" or column is None or not self.args.remove_unused_columns:
            return super()._remove_unused_columns(dataset, description=description)
        self._set_signature_columns_if_needed()
        kept = self._signature_columns
        self._signature_columns = [*kept, column]
        try:
            return super()._remove_unused_columns(dataset, description=description)
        finally:
            self._signature_columns = kept

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> tuple:
        """Prepare as stock does, for the data loader that draws Poisson batches, and no other one."""
        if train_dataloader is not self._loader:
            raise ValueError(
                "get_train_dataloader: it returns another loader than that of ZOTrainer, whose Poisson batches the "
                "guarantee depends on; remove your own, and pass train_dataset and data_collator."
            )
        # Whoever made the model: it is here, and nothing of it was evaluated.
        if self.args.private and self._log.existing is None:
            refuse_trained_model(self.model, counted=self._earlier_runs.names)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @abstractmethod
    def _refuse_overrides(self) -> None:
        """Raise `ValueError` for hooks that training would ignore."""

    def _refuse_changes(self, *, resumes: bool) -> None:
        """Raise `ValueError` for what was added since it was checked."""
        self._refuse_overrides()
        refuse_arguments(self.args)
        parts = {"data_collator": self.data_collator, "callbacks": self.callback_handler.callbacks}
        refuse_parts(dataset=self.train_dataset, **parts, args=self.args)
        if resumes:
            refuse_resuming(self.args)

    def _inspect(self, model: torch.nn.Module) -> None:
        """Build what evaluates batches on `model`, as it is prepared for training, and measure how it isolates rows."""
        self._estimate = self._build_estimate()
        losses = self._public_losses
        model.eval()
        with self._state.held_still():
            if isinstance(losses, FSDPLosses):
                losses.learn_gather_order(model, self._public_batches[0])
            if not self.args.private:
                evaluate = functools.partial(losses.of_public, model)
                self._public_batches = choose_tried_rows(evaluate, self._public_batches, self._first_rows)
            self._foresee_failures(model, losses)
            if losses is self._estimate.losses:
                known = {"num_rows": self._units.public_facts["rows"], "longest_row": self.longest_row}
                known["most_drawn"] = self._count_most_rows(self.budget.planned_steps)
                cache = build_frozen_cache(self.args, model, self.train_dataset, **known)
                public = self._public_batches
                self._shared = find_shared_work(model, losses, public, cache, longest_row=self.longest_row)
                losses = dataclasses.replace(losses, shared=self._shared)
                self._estimate = dataclasses.replace(self._estimate, losses=losses)
            if self.args.private:
                self._isolation = self._measure_isolation(model, losses, self._public_batches)
            elif self._points_per_pass is not None and losses is self._estimate.losses:
                try_stacked(model, losses, self._public_batches[0], self._points_per_pass)
        if self.eval_dataset is not None:
            try_public_evaluation(self, self._public_batches, are_made_up=self.probe_rows is None)

    def _foresee_failures(self, model: torch.nn.Module, losses: BatchLosses) -> None:
        """Raise `ValueError` if rows of a public length, or public evaluation rows, fail in the model or its loss."""
        if isinstance(losses, FSDPLosses):  # All processes would have to fail together.
            return
        collator = dataclasses.replace(losses.collator, padded_lengths=(), micro_batch_size=1)
        evaluate = functools.partial(dataclasses.replace(losses, collator=collator).of_public, model)
        length = max(self.longest_row, find_public_length(self.train_dataset, self.args.padded_lengths))
        for rows in self._public_batches[:1]:
            refuse_missing_positions(model, evaluate, rows, length)
            if self._train_batch_size > 1 and self.probe_rows is None:
                warn_of_rows_alone(losses.collator.collate, rows, self.train_dataset)
        if self.args.eval_data_is_public or not self.args.private:
            for name, dataset in list_evaluated(self).items():
                refuse_failing_rows(name, dataset, evaluate)

    def _build_estimate(self) -> StepEstimate:
        """Return what evaluates batches on the model."""
        return assemble_estimate(
            self.model,
            self._processes,
            loss=self.per_example_loss,
            collator=self._collator,
            prepare=self._prepare_inputs,
            device=self.args.device,
            state=self._state,
            capacity=self._batch_capacity,
        )

    @property
    def _public_losses(self) -> BatchLosses:
        """What evaluates public rows of the data set's format."""
        return self._estimate.losses

    def _measure_isolation(self, model: torch.nn.Module, losses: BatchLosses, batches: list[Rows]) -> Isolation:
        """Return how far public rows of `batches` move each other's `losses`; raise `CoupledRowsError` if too far."""
        points = self._points_per_pass if losses is self._estimate.losses else None
        kind = "made-up" if self.probe_rows is None else "public"
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        with logging.tqdm(desc=f"Trying {kind} rows", unit=" batches", disable=hidden) as bar:
            isolation = measure_isolation(model, losses, batches, points_per_pass=points, tick=bar.update)
        isolation = Isolation(loss_change=self._processes.all_reduce_max(isolation.loss_change))
        refuse_weak_isolation(self._bound_isolation(isolation))
        if losses.shared is not None and not isolation.is_bitwise:
            losses.shared.read_rows_alone()
        return isolation

    def _build_public_batches(self, dataset: Any) -> list[Rows]:
        """Return batches of public rows; none if rows can not be made up, and a run does not need any."""
        if not self.args.private:
            self._first_rows = read_first_rows(dataset, dropped_column=self.args.privacy_unit_column)
        try:
            kept = self._find_collated_columns(dataset)
            known = {"public_rows": self.probe_rows, "ending": self.row_ending}
            return build_probe_batches(dataset, self.model, self._collator, kept_columns=kept, **known)
        except ValueError:
            if self.args.private or is_sharded(self.model.parameters()):
                raise
            return []

    def _fingerprint_responses(self) -> list[int]:
        """Return checksums of public rows' losses, and of what the model returns for them; none without such rows."""
        responses: list[torch.Tensor] = []
        with ExitStack() as hooks, self._state.held_still():
            if self.model_wrapped is self.model:  # A hook within a compiled model would compile it again.
                hook = unwrap_model(self.model).register_forward_hook
                hooks.enter_context(hook(lambda *call: responses.extend(iterate_tensors(call[-1]))))
            for rows in self._public_batches[:1]:
                responses.append(self._public_losses.of_public(self.model_wrapped, rows))
        return checksum_each(responses)

    @property
    def _batch_capacity(self) -> int | None:
        """The number of rows that a batch has room for, if processes divide its probe points; otherwise `None`."""
        return self._count_most_rows() if self.args.parallel == "points" else None

    def _find_collated_columns(self, dataset: Any) -> set[str]:
        """Return the names of the columns of `dataset` that reach the collator."""
        kept = list_columns(dataset, self.probe_rows) - {self.args.privacy_unit_column}
        return kept & set(self._signature_columns or kept)

    @property
    def _points_per_pass(self) -> int | None:
        """The points of each pass, so that few fill up the last one; `None` where the parameters move to each."""
        requested = self.args.points_per_pass
        if requested is None and self._shared is not None and self.args.parallel != "points":
            requested = self._shared.points_per_pass
        points = self.method.estimator.forward_passes
        return None if requested is None else -(-points // -(-points // requested))

    @property
    def _environment(self) -> dict[str, Any]:
        """What holds for this part of the run, and may be otherwise where it goes on."""
        bound = self._isolation and self._bound_isolation(self._isolation)
        here = describe_isolation(self._isolation, fixed_shapes=self._has_fixed_shapes, bound=bound)
        # The guarantee covers earlier runs too, so it is that of the worst.
        isolation = worst_isolation([here, *self._earlier_runs.isolations])
        return {
            "isolation": dict(isolation),
            "versions": collect_versions(),
            "device": describe_device(self.args.device),
            "processes": self._processes.size,
        }

    def _bound_isolation(self, measured: Isolation) -> float:
        """Return how far one unit more or less moves the parts of all others together at most, in clip norms."""
        reached_rows = count_reached_rows(
            micro_batch_size=self._train_batch_size,
            fixed_shapes=self._has_fixed_shapes,
            batch_capacity=self._count_most_rows(),
            rows_per_unit=self._units.max_rows_per_unit,
        )
        return isolation_bound(self.method, self.budget.planned_steps, measured.loss_change, reached_rows=reached_rows)

    def _count_most_rows(self, steps: int = 1) -> int:
        """Return how many rows `steps` draw together at most, a public number that is not exceeded in practice."""
        expected = steps * self._row_facts["expected_batch_size"]
        return batch_capacity(expected, max_rows_per_unit=self._units.max_rows_per_unit)

    @property
    def _has_fixed_shapes(self) -> bool:
        """Whether the shape in which a row is evaluated depends only on public values and on that row."""
        return self._train_batch_size == 1 or bool(self.args.padded_lengths)
