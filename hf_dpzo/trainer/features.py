"""The auditing Trainer, for heads on features: what the frozen base says of a row is computed once, before training.

A step then takes its rows from a table, and no row is read, collated or passed through the base again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.data.sampling import DrawnRow, FetchedRow, SealedRows
from hf_dpzo.data.tables import Table, TableBatchSampler, TableCollator, choose_block_size
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.isolation.measure import Rows
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.losses.features import FeatureClassificationLoss, FeatureReader, LabelForm, reads_features
from hf_dpzo.models.checks import refuse_shared_scales
from hf_dpzo.models.precision import refuse_changed_losses
from hf_dpzo.models.state import ModelState
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.estimate import StepEstimate
from hf_dpzo.trainer.auditing import AuditingTrainer
from hf_dpzo.trainer.progress import row_bar


# The number of rows that are fetched at once, to compute their features: enough for rows of one of many public lengths
# to fill micro-batches.
ROWS_AT_ONCE = 1024


# The fewest rows that a block of the table has room for, however many points a pass evaluates.
MIN_BLOCK = 256


# The most scores that a block has for all probe points of one pass: 64 MiB.
MAX_SCORES = 1 << 24


class FeatureTrainer(AuditingTrainer):
    """An auditing Trainer that computes the features of each row once, if the model is a head on features.

    Guarantee: the features of a row depend on that row alone, to the last bit. They are computed in public shapes: the
    row alone, or in micro-batches of `padded_lengths`. A row on which that fails has NaN, and contributes nothing.
    """

    # The rows' features, and what fetches the rows themselves; `None` for other models.
    _table: Table | None = None
    _token_rows: SealedRows
    _table_sampler: TableBatchSampler
    # The base, which evaluating rows may not change either.
    _base_state: ModelState
    # What evaluates rows of tokens, in the shapes in which features are computed.
    _token_losses: BatchLosses
    _feature_reader: FeatureReader

    @property
    def _is_tabulated(self) -> bool:
        """Whether steps take features from a table."""
        return reads_features(self.model) and not is_sharded(self.model.parameters())

    def _refuse_model(self) -> None:
        """Raise `ValueError` for a model that cannot be trained, or for a base that does not keep rows apart."""
        super()._refuse_model()
        if self._is_tabulated and self.args.private:
            refuse_shared_scales(self.model.base)

    def _tabulate(self, loader: DataLoader) -> DataLoader:
        """Return a loader of the rows' features in the place of `loader`; for any other model, `loader` itself."""
        if not self._is_tabulated:
            self._table = None
            return loader
        form = self._find_label_form()
        self._feature_reader = FeatureReader(form)
        self._token_rows = loader.dataset
        self._table_sampler = TableBatchSampler(loader.batch_sampler)
        width = self.model.config.hidden_size + form.numbers
        unread = torch.full((len(loader.dataset), width), torch.nan, device=self.args.device)
        self._table = Table(columns=self._feature_reader.split(unread))
        return DataLoader(self._table, batch_sampler=self._table_sampler, collate_fn=self._build_table_collator())

    def _find_label_form(self) -> LabelForm:
        """Return what a label is, by public rows; a class if there are none."""
        for rows in self._public_batches[:1]:
            collated = self._collator.collate([dict(row) for row in rows[:2]])
            if isinstance(collated.get("labels"), torch.Tensor):
                return LabelForm(dtype=collated["labels"].dtype, shape=tuple(collated["labels"].shape[1:]))
        return LabelForm(dtype=torch.int64)

    def _build_table_collator(self) -> TableCollator:
        per_unit = self._units.max_rows_per_unit
        expected = self.args.resolve_batch_size(self._num_units)
        size = choose_block_size(expected, self._num_units, max_rows_per_unit=per_unit)
        most = math.ceil(MAX_SCORES / (self.model.config.num_labels * (self._points_per_pass or 1)))
        return TableCollator(micro_batch_size=min(size, most), device=self.args.device)

    def _build_estimate(self) -> StepEstimate:
        """Return what evaluates batches: of features, if there is a table of them."""
        estimate = super()._build_estimate()
        if self._table is None:
            return estimate
        # A row alone, or in one of few public shapes.
        collator = self._collator if self._collator.padded_lengths else replace(self._collator, micro_batch_size=1)
        self._base_state = ModelState(self.model.base, moving=())
        self._token_losses = replace(estimate.losses, collator=collator, state=self._base_state)
        return replace(estimate, losses=replace(estimate.losses, collator=self._build_table_collator()))

    @property
    def _public_losses(self) -> BatchLosses:
        """What evaluates public rows of tokens."""
        return super()._public_losses if self._table is None else self._token_losses

    @property
    def _points_per_pass(self) -> int | None:
        """The number of probe points of one pass; by default all of them, where a pass is one product of matrices."""
        if self._table is None or self.args.points_per_pass is not None or not self._is_product:
            return super()._points_per_pass
        most = max(1, MAX_SCORES // (MIN_BLOCK * self.model.config.num_labels))
        return min(self.method.estimator.forward_passes, most)

    @property
    def _is_product(self) -> bool:
        """Whether one pass evaluates all probe points as one product, in this process."""
        return isinstance(self.per_example_loss, FeatureClassificationLoss) and self.args.parallel != "points"

    @property
    def _has_fixed_shapes(self) -> bool:
        """Whether the shape in which a row is evaluated is public, as that of a block of a table is."""
        return self._is_tabulated or super()._has_fixed_shapes

    def _open_log(self, header: dict[str, Any], model: torch.nn.Module) -> None:
        """Compute the features of private rows, which may take long, and then open the log."""
        if self._table is not None:
            with self._state.held_still(), self._base_state.held_still():
                self._fill_table(model)
        super()._open_log(header, model)

    def _measure_isolation(self, model: torch.nn.Module, losses: BatchLosses, batches: list[Rows]) -> Isolation:
        """Return how far public rows move each other: where features are computed, and where steps use them."""
        measured = super()._measure_isolation(model, losses, batches)
        if self._table is None:
            return measured
        refuse_changed_losses(self.model.base, measured.loss_change)
        read = [self._read_public(model, rows) for rows in batches]
        in_steps = super()._measure_isolation(model, self._estimate.losses, read)
        return max(measured, in_steps, key=lambda isolation: isolation.loss_change)

    def _changes_in_jumps(self, model: torch.nn.Module, losses: BatchLosses, batches: list[Rows]) -> bool:
        """Return whether losses jump; of a head, which alone moves, by features that are computed once."""
        if self._table is None or losses is not self._token_losses:
            return super()._changes_in_jumps(model, losses, batches)
        read = [self._read_public(model, rows) for rows in batches]
        return super()._changes_in_jumps(model, self._estimate.losses, read)

    def _read_public(self, model: torch.nn.Module, rows: Rows) -> Rows:
        """Return public `rows` of tokens as rows of features."""
        columns = self._feature_reader.split(self._read_with(self._feature_reader).of_public(model, rows))
        return [{name: column[index] for name, column in columns.items()} for index in range(len(rows))]

    def _prepare_public(self, model: torch.nn.Module, rows: Rows) -> Callable[[], torch.Tensor]:
        """Return a function that evaluates public `rows`, whose features are computed once."""
        if self._table is None:
            return super()._prepare_public(model, rows)
        return partial(self._estimate.losses.of_public, model, self._read_public(model, rows))

    def _read_with(self, reader: FeatureReader) -> BatchLosses:
        width = sum(column[0].numel() for column in self._table.columns.values())
        return replace(self._token_losses, loss=reader, tail=(width,))

    def _fill_table(self, model: torch.nn.Module) -> None:
        """Compute the features of all rows that this process may draw. SENSITIVE."""
        numbers = self._table_sampler.own_rows
        # How many rows there are is public where each is a unit, and only all of them together.
        is_counted = self._units.members is None and self._processes.size == 1
        is_hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        parts = [numbers[start : start + ROWS_AT_ONCE] for start in range(0, len(numbers), ROWS_AT_ONCE)]
        read = self._read_with(self._feature_reader)
        with row_bar("Reading features", len(numbers), is_counted=is_counted, is_hidden=is_hidden) as bar:
            for part in parts:
                drawn = [DrawnRow(unit=slot, row=row, slot=slot) for slot, row in enumerate(part.tolist())]
                batch = self._token_losses.collator(self._token_rows.__getitems__(drawn))["batch"]
                for micro_batch in batch.micro_batches:
                    one = replace(batch, micro_batches=(micro_batch,))
                    self._write(part[one.row_slots], read(model, one))
                    bar.refresh()  # How many rows of which length there are is secret, so the number stays.
                bar.update(len(part))

    def _write(self, numbers: np.ndarray, read: torch.Tensor) -> None:
        places = torch.from_numpy(numbers).to(read.device)
        for name, column in self._feature_reader.split(read).items():
            self._table.columns[name].index_copy_(0, places, column)

    def _build_canary_batch(self) -> LogicalBatch:
        """Return a batch of all canaries, each a unit of its own; of their features if steps use these."""
        if self._table is None:
            return super()._build_canary_batch()
        rows: Sequence[Any] = self._read_public(self.model, [dict(row) for row in self._canaries])
        fetched = [FetchedRow(unit=unit, row=row, slot=unit) for unit, row in enumerate(rows)]
        return self._estimate.losses.collator(fetched)["batch"]
