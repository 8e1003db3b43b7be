"""The searching Trainer, made careful: it refuses what would break the guarantee before it evaluates private rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_dpzo.arguments.unsupported import refuse_arguments
from hf_dpzo.card.declarations import collect_versions
from hf_dpzo.data.checks import refuse_changed_rows, refuse_differing_rows
from hf_dpzo.distributed.processes import Processes
from hf_dpzo.isolation.bound import describe_isolation, isolation_bound, refuse_weak_isolation
from hf_dpzo.isolation.measure import Rows, build_probe_batches, measure_isolation
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.isolation.synthetic_rows import infer_columns
from hf_dpzo.models.checks import (
    refuse_left_padding,
    refuse_model,
    refuse_sharded_parameters,
    refuse_unsupported_sharding,
)
from hf_dpzo.models.precision import refuse_variable_shapes
from hf_dpzo.models.unwrap import unwrap_model
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.fsdp import FSDPLosses
from hf_dpzo.trainer.checks import (
    refuse_changed_arguments,
    refuse_large_copies,
    refuse_parts,
    refuse_resuming,
    refuse_trained_model,
)
from hf_dpzo.trainer.searching import SearchingTrainer
from hf_dpzo.trajectory.run import is_stateful


class CheckingTrainer(SearchingTrainer):
    """A searching Trainer that checks its model, its parts and its environment before it trains.

    Subclasses set the processes, and `probe_rows` where the user passes public rows.
    """

    probe_rows: Sequence[Mapping[str, Any]] | None
    _processes: Processes
    _isolation: Isolation | None = None

    def _refuse_model(self) -> None:
        """Raise `ValueError` for a model that cannot be trained, or that does not keep rows apart."""
        refuse_unsupported_sharding(self.model, self.args, distributed_type=self.accelerator.distributed_type.value)
        refuse_model(self.model, private=self.args.private)
        if self.args.private:
            refuse_variable_shapes(self.model, fixed=self._has_fixed_shapes)
        refuse_left_padding(self.model, self.processing_class)
        refuse_large_copies(self.model, self.args.points_per_pass)

    def _refuse_rows(self, dataset: Any) -> None:
        """Raise `ValueError` unless the rows about to be read are the planned ones, and the same in all processes."""
        refuse_changed_rows(self.train_dataset, dataset, self._units.num_rows - (self.args.canaries or 0))
        refuse_sharded_parameters(self.model, self.args, is_stateful=is_stateful(self.method, self.args.update_rule))
        refuse_differing_rows(self._processes, dataset, self._units)

    def _refuse_changes(self, *, resumes: bool) -> None:
        """Raise `ValueError` for what was changed since the budget was planned, or added since it was checked."""
        refuse_arguments(self.args)
        refuse_changed_arguments(self.args, self._planned_values)
        parts = {"data_collator": self.data_collator, "callbacks": self.callback_handler.callbacks}
        refuse_parts(dataset=self.train_dataset, **parts, args=self.args)
        if resumes:
            refuse_resuming(self.args)
        elif self.args.private and self.model_init is None:
            refuse_trained_model(unwrap_model(self.model))

    def _measure_isolation(self, losses: BatchLosses, dataset: Any) -> Isolation | None:
        """Return how far public rows move each other's losses; `None` in a run that is not private.

        Raises:
            CoupledRowsError: they move them too far.
        """
        if isinstance(losses, FSDPLosses):
            losses.learn_gather_order(self.model, self._build_public_batches(losses, dataset)[0])
        if not self.args.private:
            return None
        rows = self._build_public_batches(losses, dataset)
        isolation = measure_isolation(self.model, losses, rows, points_per_pass=self._points_per_pass)
        isolation = Isolation(loss_change=self._processes.all_reduce_max(isolation.loss_change))
        refuse_weak_isolation(isolation_bound(self.method, self.budget.planned_steps, isolation.loss_change))
        return isolation

    def _build_public_batches(self, losses: BatchLosses, dataset: Any) -> list[Rows]:
        kept = self._find_collated_columns(dataset)
        return build_probe_batches(dataset, self.model, losses.collator, kept_columns=kept, public_rows=self.probe_rows)

    def _find_collated_columns(self, dataset: Any) -> set[str]:
        """Return the names of the columns of `dataset` that reach the collator."""
        kept = {column.name for column in infer_columns(dataset)} - {self.args.privacy_unit_column}
        return kept & set(self._signature_columns or kept)

    @property
    def _points_per_pass(self) -> int | None:
        """The number of probe points of one forward pass; `None` where the parameters move to each point instead."""
        requested = self.args.points_per_pass
        return None if requested is None else min(requested, self.method.estimator.forward_passes)

    @property
    def _environment(self) -> dict[str, Any]:
        """The isolation of the run's rows, and the versions of its libraries."""
        measured = self._isolation
        bound = None
        if measured is not None:
            bound = isolation_bound(self.method, self.budget.planned_steps, measured.loss_change)
        isolation = describe_isolation(measured, fixed_shapes=self._has_fixed_shapes, bound=bound)
        return {"isolation": isolation, "versions": collect_versions()}

    @property
    def _has_fixed_shapes(self) -> bool:
        """Whether the shape in which a row is evaluated depends only on public values and on that row."""
        return self._train_batch_size == 1 or bool(self.args.padded_lengths)
