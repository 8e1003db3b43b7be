"""The checking Trainer, with canaries among its rows, so that the run itself can be audited afterwards."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from hf_dpzo.auditing.canaries import Rows, RowsWithCanaries, describe_canaries, generate_canaries
from hf_dpzo.auditing.coins import Coins
from hf_dpzo.auditing.picture import draw_run_audit
from hf_dpzo.auditing.run_audit import RunAudit, audit_evidence, collect_released, measure_canaries
from hf_dpzo.auditing.scores import Evidence
from hf_dpzo.card.files import STATEMENT_FILE
from hf_dpzo.card.repository import refresh_card
from hf_dpzo.data.collation import LogicalBatch
from hf_dpzo.data.sampling import FetchedRow, SealedRows
from hf_dpzo.distributed.sharding import is_sharded
from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.models.state import ModelState
from hf_dpzo.plots import check_picture_path
from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.step.estimate import StepEstimate
from hf_dpzo.trainer.objective import ObjectiveTrainer
from hf_dpzo.trajectory.initial import restore_initial_values
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.replay import build_replay
from hf_dpzo.trajectory.run import LoggedRun


class AuditingTrainer(ObjectiveTrainer):
    """A checking Trainer that adds canaries to its rows, and audits the run that it made.

    Subclasses set the estimate that evaluates batches, when they build the data loader.
    """

    # The flags of the recipe that this trainer was built from. They are kept with the coins, for `hf-dpzo audit --run`.
    recipe_flags: tuple[str, ...] = ()
    _estimate: StepEstimate | None = None
    _canaries: Rows = ()
    # The values that the trained parameters began with, by name.
    _initial_values: Mapping[str, torch.Tensor] | None = None

    def audit_run(self, *, confidence: float = 0.95, card: bool = False, picture: str | Path | None = None) -> RunAudit:
        """Audit the run in `output_dir`, which had canaries: what does its log show of their coins?

        The log is replayed, and the canaries are evaluated at each probe point, which costs their forward passes. The
        model is left as it was.

        Args:
            confidence: the probability with which all bounds of the audit hold together.
            card: whether to write what was found into the card and `privacy.json` of the run.
            picture: the path of a picture to draw; `None` for none.

        Returns:
            the audit, with a lower bound on epsilon beside the claimed epsilon.

        Raises:
            ValueError: the run had no canaries, or its coins are not there, or the trainer cannot replay it.
        """
        self._refuse_audit(confidence)
        if picture is not None:
            check_picture_path(Path(picture))  # Before the audit, which takes longer.
        folder = Path(self.args.output_dir)
        log = Trajectory.read(folder)
        if self._estimate is None:  # In another process than the one that trained.
            self.get_train_dataloader()
            self._state = ModelState(self.model, moving=[parameter for _, parameter in self._list_trained()])
            self._estimate = self._build_estimate()
        coins = self._load_coins(folder, log)
        evidence = self._collect_evidence(folder, log)
        run = LoggedRun.from_log(log)
        found = audit_evidence(
            evidence,
            coins.mask,
            mechanism=run.method.mechanism,
            releases=run.budget.claimed_releases,
            delta=run.budget.delta,
            confidence=confidence,
        )
        if picture is not None:
            draw_run_audit(found, Path(picture))
        if card or found.exceeds_claim:
            self._empirical = found.as_json()  # From here on each card that is written has it.
        if card:
            if self._is_trained:
                self._write_card(folder, self._fingerprint())
            else:
                refresh_card(folder, empirical=self._empirical)
            for checkpoint in _list_checkpoints(folder):
                refresh_card(checkpoint, empirical=self._empirical)
        return found

    def get_train_dataloader(self) -> DataLoader:
        """Return stock's data loader; keep what the trained parameters began with, if the run has canaries."""
        if self.args.canaries and self._initial_values is None:
            self._initial_values = {name: value.detach().clone() for name, value in self._list_trained()}
        return super().get_train_dataloader()

    def _seal_rows(self, dataset: Dataset) -> SealedRows:
        """Return the rows of `dataset`, under seal, and after them the canaries if there are any."""
        column = self.args.privacy_unit_column
        if not self.args.canaries:
            return SealedRows(dataset, dropped_column=column)
        self._canaries = generate_canaries(
            dataset,
            self.model,
            count=self.args.canaries,
            longest=max(self.args.padded_lengths or (), default=None),
            kept_columns=self._find_collated_columns(dataset),
        )
        coins = self._processes.run_on_first(self._load_or_flip_coins)
        # A run that is resumed has the same rows and coins, or its log does not fit.
        self._row_facts = {**self._row_facts, "canaries": describe_canaries(self._canaries, coins)}
        return RowsWithCanaries(dataset, dropped_column=column, canaries=self._canaries, coins=coins)

    def _load_or_flip_coins(self) -> Coins:
        folder = Path(self.args.output_dir)
        if (folder / LOG_FILE).exists():
            return Coins.load(folder)
        coins = Coins.flip(self.args.canaries, self.recipe_flags)
        coins.save(folder)  # Before the first release, so that a run that is killed can be resumed and audited.
        return coins

    def _list_trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]

    def _refuse_audit(self, confidence: float) -> None:
        if self.args.canaries is None:
            raise ValueError(
                "canaries=None: an audit guesses which canaries a run had, and this one had none; train with some."
            )
        if not 0.5 <= confidence < 1:
            raise ValueError(f"confidence={confidence}: it must be at least 0.5 and below 1; 0.95 is usual.")
        if self._processes.size > 1 or is_sharded(self.model.parameters()):
            raise ValueError(
                f"processes={self._processes.size}: an audit replays the run in one process with a whole model; build "
                "the trainer there, or use hf-dpzo audit --run."
            )

    def _load_coins(self, folder: Path, log: Trajectory) -> Coins:
        coins = Coins.load(folder)
        there = log.header["rows"].get("canaries")
        different = compare_json(there, describe_canaries(self._canaries, coins))
        if different:
            raise ValueError(
                f"output_dir={folder}: its log is of a run with other canaries or other coins ({different[0]}); audit "
                "with the data, the model and the coins that it was trained with."
            )
        return coins

    def _collect_evidence(self, folder: Path, log: Trajectory) -> Evidence:
        """Return what the log shows, after replaying it from the values that the run began from."""
        if not any(not record.void for record in log.records):
            raise ValueError(f"output_dir={folder}: its log holds no step to audit; train first.")
        trained = dict(self._list_trained())
        final = {name: value.detach().clone() for name, value in trained.items()}
        _copy_values(trained, self._initial_values)
        restore_initial_values(self.model, folder)
        try:
            descent = build_replay(self.model, log)
            records = logging.tqdm(log.records, desc="Replaying the run", disable=self.args.disable_tqdm)
            estimate = StepEstimate(losses=self._estimate.losses)
            passes = {"points_per_pass": self._points_per_pass}
            coefficients = measure_canaries(descent, records, estimate, self._build_canary_batch, **passes)
        finally:
            _copy_values(trained, final)
        kept = [not record.void for record in log.records]
        mechanism = descent.method.mechanism
        spread = mechanism.noise_scale / SENSITIVITY
        return Evidence(
            coefficients=coefficients[:, kept],
            released=collect_released(log.records)[kept],
            sampling_rate=self.args.sampling_rate(self._num_units),
            noise_variance=spread**2 if self.args.noise != "laplace" else 2 * spread**2,
        )

    def _build_canary_batch(self) -> LogicalBatch:
        """Return a batch of all canaries, each a unit of its own."""
        rows = [FetchedRow(unit=unit, row=dict(row), slot=unit) for unit, row in enumerate(self._canaries)]
        return self._estimate.losses.collator(rows)["batch"]


def _list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that have cards of their own."""
    return sorted(path.parent for path in folder.glob(f"checkpoint-*/{STATEMENT_FILE}"))


@torch.no_grad()
def _copy_values(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
