"""The durable Trainer, made to publish: whatever it saves or pushes carries its guarantee and its log."""

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_dpzo.audit import Audit
from hf_dpzo.declared import Declared, versions, worse_isolation
from hf_dpzo.durable import DurableTrainer
from hf_dpzo.guard import unwrapped_optimizer
from hf_dpzo.initial import values_fingerprint
from hf_dpzo.model_card import metadata_of, write_card
from hf_dpzo.publishing import Destination, Snapshot, copy_log


logger = logging.getLogger(__name__)
SHOWN_ARGUMENTS = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_steps", "per_device_train_batch_size")


class PublishingTrainer(DurableTrainer):
    """A durable Trainer whose every save and every commit holds card, `privacy.json` and log.

    Subclasses set what an audit found.
    """

    _audit: Audit | None
    push_in_progress: PushInProgress | None = None  # As stock has it where it pushes.
    # What `create_model_card` and `push_to_hub` were told about the model.
    _metadata: Mapping[str, Any] = {}
    _dataset: Sequence[str] = ()
    _task: str | None = None
    # Of the steps whose weights the model has, where these are not all.
    _loaded_step: int | None = None

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As stock, with the guarantee written beside the weights: `README.md`, `privacy.json` and the log."""
        super().save_model(output_dir, _internal_call=True)
        if self._log is None or not self._log.opened or not self.args.should_save:
            return  # Nothing was trained, so there is nothing to say.
        self._write_card(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write this library's card, in place of one that names an optimizer that never ran.

        What it is told stays in all cards that are written from now on. `model_name` and `finetuned_from` are as stock
        has them, and not used: the card names the base model that the log does.
        """
        self._describe(language=language, license=license, tags=tags)
        self._dataset = _names(dataset_tags, dataset, dataset_args) or self._dataset
        self._task = next(iter(_names(tasks)), self._task)
        if self._log is not None and self._log.opened:
            self._write_card(Path(self.args.output_dir))

    def _describe(self, *, tags: str | list[str] | None, **metadata: Any) -> None:
        given = {name: value for name, value in metadata.items() if value is not None}
        tagged = {"tags": [*self._metadata.get("tags", ()), *_names(tags)]}
        self._metadata = {**self._metadata, **given, **tagged}

    def _write_card(self, folder: Path) -> None:
        copy_log(Path(self.args.output_dir), folder)
        there = metadata_of(Path(self.args.output_dir))
        write_card(folder, self._declared(), {**there, **self._metadata})

    def _declared(self) -> Declared:
        arguments, evaluations = self.args.to_dict(), self._evaluations()
        return Declared(
            isolation=worse_isolation(self._log.header["made_with"]["isolation"], self._made_with["isolation"]),
            audit=None if self._audit is None else self._audit.as_json(),
            weights=self._weights(),
            tuning_runs=self.args.tuning_runs,
            eval_data_is_public=self.args.eval_data_is_public,
            metrics={name: value for name, value in (evaluations or [{}])[-1].items() if name != "step"},
            history=evaluations if self.args.eval_data_is_public else (),
            hyperparameters={name: arguments[name] for name in SHOWN_ARGUMENTS},
            dataset=self._dataset,
            task=self._task,
            repository=self.hub_model_id,
            versions=versions(),
        )

    def _weights(self) -> dict[str, Any]:
        trained = unwrapped_optimizer(self.optimizer).parameters()
        return {
            "sha256": values_fingerprint(trained),
            "parameters": sum(parameter.numel() for parameter in trained),
            "bytes": sum(parameter.numel() * parameter.element_size() for parameter in trained),
            "after_step": len(self.budget.ledger) if self._loaded_step is None else self._loaded_step,
        }

    def _evaluations(self) -> list[dict[str, float]]:
        return [
            {name: value for name, value in log.items() if name == "step" or _is_shown(name, value)}
            for log in self.state.log_history
            if "eval_loss" in log
        ]

    def _load_best_model(self) -> None:
        """As stock. The weights are no longer those of the last step."""
        super()._load_best_model()
        self._loaded_step = self.state.best_global_step

    # ---- Pushing ----

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future:
        """As stock, in one commit: weights, or with `push_trajectory` none; card, `privacy.json` and log.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for it.
            token: that may write.
            revision: the branch.
            private: whether a repository that is made is private.
            kwargs: what `create_model_card` takes.

        Raises:
            ValueError: nothing was trained.
        """
        if self._log is None or not self._log.opened:
            raise ValueError("push_to_hub: nothing was trained, so there is no guarantee to publish; call train().")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        self.save_model(_internal_call=True)
        self._finish_current_push()
        snapshot = Snapshot(Path(self.args.output_dir))
        if self.args.push_trajectory:
            self._write_card(snapshot.folder)
        else:
            self.save_model(str(snapshot.folder), _internal_call=True)
        to = Destination(repository=self.hub_model_id, revision=revision or self.args.hub_revision, token=token)
        return snapshot.upload(to, message=commit_message, wait=blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As stock, from a copy of the checkpoint, which steps that follow do not change."""
        if self.args.hub_strategy == HubStrategy.END or (self._is_pushing and not self.args.hub_always_push):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        snapshot = Snapshot(Path(self.args.output_dir))
        if self.args.push_trajectory:
            self._write_card(snapshot.folder)
        else:
            snapshot.take(Path(checkpoint_folder))
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        when = f"epoch {int(self.state.epoch)}" if by_epoch else f"step {self.state.global_step}"
        to = Destination(repository=self.hub_model_id, revision=self.args.hub_revision)
        self._report_pushes()
        job = snapshot.upload(to, message=f"Training in progress, {when}", wait=False)
        jobs = self.push_in_progress.jobs if self._is_pushing else []
        self.push_in_progress = PushInProgress([*jobs, job])

    def _finish_current_push(self) -> None:
        """As stock; then say which pushes failed, which stock never looks at."""
        super()._finish_current_push()
        self._report_pushes()
        self.push_in_progress = None

    def _report_pushes(self) -> None:
        # Not where they happen: what is logged while private rows are evaluated is dropped.
        for job in [] if self.push_in_progress is None else self.push_in_progress.jobs:
            if job.done() and job.exception() is not None:
                logger.warning("A push to the Hub failed, and the next one will make up for it: %s", job.exception())

    @property
    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()


def _names(*given: str | list[str] | None) -> list[str]:
    """Each name once, in order."""
    lists = ([one] if isinstance(one, str) else one or [] for one in given)
    return list(dict.fromkeys(name for names in lists for name in names))


def _is_shown(metric: str, value: float) -> bool:
    """Whether a metric says something of the model, and not of the machine."""
    timing = metric.endswith(("_runtime", "_per_second", "_preparation_time"))
    return metric.startswith("eval_") and not timing and math.isfinite(value)
