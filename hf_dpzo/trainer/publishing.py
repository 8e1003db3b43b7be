"""The durable Trainer, made to publish: whatever it saves carries its guarantee and its log."""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import TrainOutput

from hf_dpzo.auditing.audit import Audit
from hf_dpzo.card.declarations import Declarations, collect_versions
from hf_dpzo.card.files import STATEMENT_FILE
from hf_dpzo.card.model_card import read_metadata, write_card
from hf_dpzo.card.repository import read_statement
from hf_dpzo.card.upload import copy_log
from hf_dpzo.distributed.sharding import gather_state_dict, is_sharded
from hf_dpzo.io.files import refuse_links_in
from hf_dpzo.models.adapters import saved_alone
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.models.registries import PlainState
from hf_dpzo.models.tokenizers import remember_sides
from hf_dpzo.models.unwrap import unwrap_optimizer
from hf_dpzo.trainer.entering import EnteringTrainer
from hf_dpzo.trajectory.log import LOG_FILE


SHOWN_ARGUMENTS = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_steps", "per_device_train_batch_size")


class PublishingTrainer(EnteringTrainer):
    """A durable Trainer whose every save holds card, `privacy.json` and log.

    Subclasses set what an audit found.
    """

    _audit: Audit | None
    # What an audit of the run itself found, if it is to be published.
    _empirical: Mapping[str, Any] | None = None
    # The metadata that were passed to `create_model_card` or `push_to_hub`.
    _metadata: Mapping[str, Any] = {}
    _dataset: Sequence[str] = ()
    _task: str | None = None
    # The step whose weights were loaded as the best, and the number of evaluations before they were.
    _best_step: int | None = None
    _evaluations_before_best: int | None = None
    # What is saved beside the model to read texts, as it was when training began.
    _tokenizer_before: Sequence[PlainState] = ()
    # The fingerprint of the weights at the end of training.
    _final_fingerprint: str | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights as stock does, and beside them the guarantee: `README.md`, `privacy.json` and the log.

        A checkpoint's card has no picture, because drawing takes longer than all the rest; `hf-dpzo card` draws it.
        """
        folder = Path(output_dir or self.args.output_dir)
        refuse_links_in(folder)
        if not self._is_trained:
            # There is no guarantee to state, and the card of another run must not stand beside these weights.
            self._refuse_foreign_folder(folder)
            super().save_model(output_dir, _internal_call=True)
            return
        self._save_weights(output_dir)
        fingerprint = self._fingerprint()
        if self.args.should_save:
            # A checkpoint's card need not wait for the disk, because the mark that completes the checkpoint does.
            self._write_card(folder, fingerprint, pictured=not _internal_call, durably=not _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _restore_plain_parts(self) -> None:
        """Give configurations and the tokenizer back what they had when training began, whatever rows wrote there."""
        for state in (*self._plain, *self._tokenizer_before):
            state.restore()

    def _save_weights(self, output_dir: str | None = None) -> None:
        if self._final_fingerprint is None:  # Training lasts; what a user changes afterwards is saved.
            self._restore_plain_parts()
        self._refuse_changed_weights()
        self._refuse_switched_adapter()
        self._record_values()
        if isinstance(self.model, PeftModel):
            # PEFT would name the path that the base model was loaded from on this machine.
            self.model.active_peft_config.base_model_name_or_path = self._log.header["base"]["name"]
        super().save_model(output_dir, _internal_call=True)

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
        """Write this library's card, because stock's would name an optimizer that never ran.

        The arguments apply to all cards that are written from now on. `model_name` and `finetuned_from` are accepted
        because stock has them, but not used: the card names the base model that the log names.
        """
        given = {"language": language, "license": license, "datasets": _merge_names(dataset_tags) or None}
        given = {name: value for name, value in given.items() if value is not None}
        self._metadata = {**self._metadata, **given, "tags": [*self._metadata.get("tags", ()), *_merge_names(tags)]}
        self._dataset = _merge_names(dataset_tags, dataset, dataset_args) or self._dataset
        self._task = next(iter(_merge_names(tasks)), self._task)
        if not self._is_trained:
            return
        self._refuse_switched_adapter()
        fingerprint = self._fingerprint()
        if self.args.should_save:
            # TRL also calls this at each checkpoint, whose card has no picture.
            self._write_card(Path(self.args.output_dir), fingerprint, pictured=self._at_checkpoint is None)

    @property
    def _is_trained(self) -> bool:
        """Whether a log that leads to the model's weights has been opened."""
        return self._log is not None and self._log.was_opened

    def _refuse_foreign_folder(self, folder: Path) -> None:
        if (folder / LOG_FILE).exists():
            raise ValueError(
                f"output_dir={folder}: it holds the log of a run that did not lead to this model; save elsewhere."
            )

    def _refuse_changed_weights(self) -> None:
        """Raise `ValueError` for a model that is not the one that was trained, or that was changed since."""
        present = {id(parameter) for parameter in self.model.parameters()}
        optimizer = unwrap_optimizer(self.optimizer)
        if optimizer.is_midstep:
            raise ValueError(
                "model: training was stopped in the middle of a step, and the log leads to these weights only up to "
                "rounding; go on with resume_from_checkpoint=True, or get the weights after any step by hf-dpzo replay."
            )
        if self._seal.is_broken() or not present >= {id(parameter) for parameter in optimizer.parameters()}:
            raise ValueError(
                "model: it is another one than training left, or was changed since, and the log does not lead to it; "
                "save it by its own save_pretrained."
            )
        self._state.restore_buffers()
        changed = self._state.find_change()
        if changed is not None:
            raise ValueError(
                f"model: {changed} is not trained, and is another one than when the run began, which may carry rows "
                "into it; load the model anew, and give it what was trained by hf-dpzo replay."
            )

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        """Train as stock does, then keep the fingerprint of the final weights."""
        self._final_fingerprint = self._best_step = self._evaluations_before_best = None
        tokenizer = self._saved_tokenizer
        self._tokenizer_before = () if tokenizer is None else (PlainState.of(tokenizer),)
        if self.is_world_process_zero() and not (Path(self.args.output_dir) / LOG_FILE).exists():
            # It is of another run, whose log was deleted, and says nothing about this one.
            (Path(self.args.output_dir) / STATEMENT_FILE).unlink(missing_ok=True)
        output = super().train(*args, **options)
        self._restore_plain_parts()
        self._final_fingerprint = fingerprint_values(unwrap_optimizer(self.optimizer).parameters())
        return output

    @property
    def _saved_tokenizer(self) -> Any:
        """What stock saves beside a model: what processes texts, or else the collator's tokenizer."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as stock does, after all processes have gathered weights that the user, and not stock, has sharded."""
        is_adapter = isinstance(self.model, PeftModel)  # Only its trainable parameters are saved.
        saved = [parameter for parameter in self.model.parameters() if parameter.requires_grad or not is_adapter]
        if is_sharded(saved) and not self.is_distributed_loading_by_transformers:
            state_dict = gather_state_dict(self.model, keep=self.args.should_save)
        remember_sides(self._saved_tokenizer)
        with saved_alone(self.model):
            super()._save(output_dir, state_dict)

    def _fingerprint(self) -> str:
        """Return the fingerprint of the trained weights. All processes must call this together."""
        cached = self._at_checkpoint or self._final_fingerprint
        return cached or fingerprint_values(unwrap_optimizer(self.optimizer).parameters())

    def _write_card(self, folder: Path, fingerprint: str, *, pictured: bool = True, durably: bool = True) -> None:
        run = Path(self.args.output_dir)
        copy_log(run, folder, durably=durably)
        metadata = {**read_metadata(run), **self._metadata}
        write_card(folder, self._collect_declarations(fingerprint), metadata, pictured=pictured, durably=durably)

    def _find_empirical(self, declared: Declarations | None) -> Mapping[str, Any] | None:
        """Return what an audit of the run found: the one that exceeds its claim, or else the last that is known."""
        known = [one for one in (self._empirical, declared and declared.empirical) if one is not None]
        return next((one for one in known if one["exceeds_claim"]), known[0] if known else None)

    def _read_declarations(self) -> Declarations | None:
        """Return what the card in the run's folder declares of the run beside this process; `None` if nothing can be.

        Another process may have begun the run with other flags, or have audited its canaries.
        """
        if self._log.existing is None and not self.args.canaries:
            return None
        statement = read_statement(Path(self.args.output_dir))
        return None if statement is None else Declarations.from_statement(statement)

    def _collect_declarations(self, fingerprint: str) -> Declarations:
        arguments = self.args.to_dict()
        weights = self._describe_weights(fingerprint)
        step, metrics = self._find_last_evaluation(weights["after_step"])
        declared = self._read_declarations()
        tuning_runs = [self.args.tuning_runs, declared and declared.tuning_runs]
        return Declarations(
            isolation=self._log.header["made_with"]["isolation"],  # That of later parts is beside the log.
            audit=None if self._audit is None else self._audit.as_json(),
            empirical=self._find_empirical(declared),
            weights=weights,
            tuning_runs=max(filter(None, tuning_runs), default=None),
            eval_data_is_public=self.args.eval_data_is_public,
            metrics=metrics,
            metrics_step=step,
            history=self._list_evaluations()[: self._evaluations_before_best] if self.args.eval_data_is_public else (),
            hyperparameters={name: arguments[name] for name in SHOWN_ARGUMENTS},
            dataset=self._dataset,
            task=self._task,
            repository=self.hub_model_id,
            data_ledger=self.data_ledger_facts or (declared and declared.data_ledger),
            versions=collect_versions(),
            names_software=True,
        )

    def _describe_weights(self, fingerprint: str) -> dict[str, Any]:
        optimizer = unwrap_optimizer(self.optimizer)
        trained = optimizer.parameters()
        # A run that was stopped between a release and its update has logged one step more than it took.
        taken = self._log.num_written - (len(optimizer.pending_coefficients) > 0)
        return {
            "sha256": fingerprint,
            "parameters": sum(parameter.numel() for parameter in trained),
            "bytes": sum(parameter.numel() * parameter.element_size() for parameter in trained),
            "after_step": taken if self._best_step is None else self._best_step,
        }

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **options: Any
    ) -> dict:
        """Evaluate as stock does. What the card shows, by the prefix "eval", is measured with the trained adapter."""
        if self._is_trained and metric_key_prefix == "eval":
            self._refuse_switched_adapter()
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **options)

    def _list_evaluations(self) -> list[dict[str, float]]:
        return [
            {_sanitize(name): value for name, value in log.items() if name == "step" or _is_model_metric(name, value)}
            for log in self.state.log_history
            if "eval_loss" in log
        ]

    def _find_last_evaluation(self, after_step: int) -> tuple[int | None, dict[str, float]]:
        """Return the step and the metrics of the last evaluation of these weights, or else of earlier ones."""
        evaluations = self._list_evaluations()
        of_best = [] if self._evaluations_before_best is None else evaluations[self._evaluations_before_best :]
        earlier = [evaluation for evaluation in evaluations if evaluation["step"] <= after_step]
        if of_best:  # They evaluate the best weights, however many steps were taken in all.
            step, last = after_step, of_best[-1]
        elif earlier:
            step, last = earlier[-1]["step"], earlier[-1]
        else:
            return None, {}
        return step, {name: value for name, value in last.items() if name != "step"}

    def _load_best_model(self) -> None:
        """Load the best weights as stock does, and keep their step, because they are not the last step's."""
        super()._load_best_model()
        self._seal.apply()
        self._best_step = self.state.best_global_step
        self._evaluations_before_best = len(self._list_evaluations())


def _merge_names(*given: str | list[str] | None) -> list[str]:
    """Return each name once, in order."""
    lists = ([names] if isinstance(names, str) else names or [] for names in given)
    return list(dict.fromkeys(name for names in lists for name in names))


def _sanitize(metric: str) -> str:
    return re.sub(r"[^\w./@-]", "_", metric)[:128]


def _is_model_metric(metric: str, value: Any) -> bool:
    """Return whether a metric is a number that describes the model, and not the machine's speed."""
    timing = metric.endswith(("_runtime", "_per_second", "_preparation_time"))
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return metric.startswith("eval_") and not timing and is_number and math.isfinite(value)
