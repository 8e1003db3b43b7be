"""The pushing Trainer, made to search: each trial is a run of its own, and every card counts all of them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import BestRun, TrainOutput

from hf_dpzo.arguments.plan import PLANNED_FLAGS
from hf_dpzo.data.units import Units
from hf_dpzo.privacy.ledger import Budget, BudgetExceededError
from hf_dpzo.trainer.callbacks import FirstStepGuard
from hf_dpzo.trainer.pushing import PushingTrainer
from hf_dpzo.trajectory.log import LOG_FILE
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer


# Flags that determine what a run releases. If a trial changes that, the error names those that the trial set.
COUNTED = (
    "method",
    "target_epsilon",
    "target_delta",
    "noise_multiplier",
    "noise",
    "paper_noise",
    "expected_batch_size",
    "max_steps",
    "num_train_epochs",
    "trials",
    "earlier_runs",
    "report_failed_rows",
)


# Flags that no trial may set, because they were used before the first one, or because a card states them for all.
FIXED_FLAGS = (
    "privacy_unit_column",
    "max_rows_per_unit",
    "eval_data_is_public",
    "privacy_ledger",
    "output_dir",
    "push_to_hub",
    "padded_lengths",
    "per_device_train_batch_size",
)


class SearchingTrainer(PushingTrainer):
    """A pushing Trainer that plans its run and, in a search, each trial as a run in a folder of its own.

    Subclasses set the units of privacy.

    Guarantee: no more than `args.trials` trials begin, all of them release the same query equally often, and the
    epsilon that each of them states covers them all.
    """

    _units: Units
    # The arguments before the search, and the budget that each of its trials must have.
    _original_arguments: dict[str, Any]
    _counted_budget: Budget
    _trials_begun: int = 0

    def _plan_run(self) -> None:
        """Plan a run from the arguments: its method, its budget, its optimizer, and public facts about its rows."""
        args = self.args
        units = len(self._units)
        self._row_facts = {
            **self._units.public_facts,
            "expected_batch_size": args.resolve_batch_size(units),
            "privacy_unit_column": args.privacy_unit_column,
            "max_rows_per_unit": args.max_rows_per_unit,
            # These must not change when a run is resumed, because the card states one isolation for the whole run.
            "padded_lengths": args.padded_lengths,
            "points_per_pass": args.points_per_pass,
            "evaluated_alone": self._train_batch_size == 1,
        }
        self.method, self.budget = args.plan(units) if units else (None, None)
        self._planned_values = args.planned_values
        settings = {"directions": DIRECTIONS[args.directions], "seed": args.seed, "lr": args.learning_rate}
        settings |= {"update": args.update_rule, "constraint": self.method and self.method.constraint}
        self.optimizer_cls_and_kwargs = (ZOOptimizer, settings)
        self.remove_callback(FirstStepGuard)
        if self.method is not None:
            self.add_callback(
                FirstStepGuard(
                    smoothing=self.method.smoothing,
                    begin_stage=self._begin_stage,
                    fingerprint_responses=self._fingerprint_responses,
                )
            )

    @abstractmethod
    def _fingerprint_responses(self) -> list[int]:
        """Return checksums of what the model answers to public rows, at the point where its parameters are."""

    # ---- The search ----

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | None = None,
        hp_name: Callable | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search as stock does, by Optuna.

        Each trial leaves its log and its card in `output_dir/run-NUMBER`, and every card counts all trials. The model
        of the last trial is not kept: publish the folder of the best trial, or load what its log leads to.

        Args:
            hp_space: a function that returns what a trial sets. It may not change what a step releases, or the number
                of steps.
            compute_objective: see stock.
            n_trials: the number of trials, at most the arguments' `trials`, for which noise or epsilon was computed.
            direction: see stock.
            backend: `optuna`, or `None`.
            hp_name: a function that names the folder of a trial, as in stock.
            kwargs: arguments of Optuna, as in stock.

        Raises:
            ValueError: the trials could not be counted; raised before any data are touched.
            BudgetExceededError: this trainer has trained before.
        """
        self._refuse_search(n_trials, backend, kwargs.get("n_jobs", 1))
        self._refuse_beyond_budget(runs=n_trials or 1)
        self._original_arguments, self._counted_budget = dict(vars(self.args)), self.budget
        try:
            return super().hyperparameter_search(
                _check_hp_space(hp_space),
                compute_objective,
                n_trials,
                direction,
                backend or "optuna",
                hp_name,
                **kwargs,
            )
        finally:
            # Stock does not reset the backend if a trial fails, nor the arguments that the last trial set.
            self.hp_search_backend = None
            vars(self.args).update(self._original_arguments)
            if not self._trials_begun:  # A trial that was refused may have planned another run.
                self._plan_run()

    def _refuse_search(self, n_trials: int | None, backend: str | None, n_jobs: int) -> None:
        """Raise for what would break the count of trials, or the budget that each of them is counted with."""
        if self.budget is None:
            raise ValueError("train_dataset=None: a search needs rows; pass train_dataset.")
        self._refuse_spent()
        self.budget.require_steps(self.budget.planned_steps)
        if n_trials is not None and type(n_trials) is not int:
            raise ValueError(f"n_trials={n_trials!r}: it is no whole number; pass how many trials to make.")
        private, trials = self.args.private, self.args.trials
        too_many = private and (n_trials is None or n_trials > trials)
        others = list(Path(self.args.output_dir).rglob(LOG_FILE))
        refused = {
            f"backend={backend}": (
                backend not in (None, "optuna"),
                "its trials are made elsewhere, where nothing counts them; choose optuna",
            ),
            f"n_jobs={n_jobs}": (n_jobs != 1, "a trainer makes one trial after the other; remove it"),
            f"n_trials={n_trials}": (
                too_many,
                f"the guarantee covers trials={trials}; set that to as many, or more, in the arguments",
            ),
            f"output_dir={self.args.output_dir}": (
                private and len(others) > 0,
                f"it holds {len(others)} logs of other runs, which trials={trials} does not count; choose another",
            ),
            f"processes={self.args.world_size}": (
                self.args.world_size > 1,
                "a trial that fails or is pruned in one would leave the others waiting; search in one process",
            ),
            "eval_dataset=None": (self.eval_dataset is None, "trials are compared by it; pass eval_dataset"),
            "eval_data_is_public=False": (
                private and not self.args.eval_data_is_public,
                "a search lets the evaluation data choose the model; set it to True if they are public",
            ),
            f"canaries={self.args.canaries}": (
                self.args.canaries is not None,
                "the coins are those of one run, and a search makes several; leave them out",
            ),
            "push_to_hub=True": (
                self.args.push_to_hub,
                "each trial would replace the one before; push the folder of the best one afterwards",
            ),
        }
        for name, (condition, reason) in refused.items():
            if condition:
                raise ValueError(f"{name}: {reason}.")

    def _refuse_spent(self) -> None:
        if self._trials_begun:
            raise BudgetExceededError(
                f"trials={self.args.trials}: a search of this trainer has begun {self._trials_begun} of them; publish "
                "the folder of its best one, or make a new trainer, whose run is one more of the trials."
            )

    # ---- One trial ----

    def _begin_trial(self, trial: Any) -> None:
        """Set the arguments of `trial`, check that the budget counts it, plan its run, and set its folder.

        This must come before the trial's model is created, which stock would seed with what the previous trial set.
        """
        if trial is None:
            self._refuse_spent()
            return
        if self.hp_search_backend is None:
            raise ValueError("trial: it is a part of a search; call hyperparameter_search, which counts them.")
        vars(self.args).update(self._original_arguments)  # Undo what the previous trial set.
        super()._hp_search_setup(trial)
        self.args.check_values()
        changed = self._list_changed(FIXED_FLAGS)
        if changed:
            raise self._build_uncounted_error(changed)
        self._plan_run()
        if self.args.private or self._counted_budget.private:
            self._refuse_uncounted(trial.number)
        self.args.output_dir = super()._get_output_dir(trial)
        self._trials_begun += 1

    def _refuse_uncounted(self, number: int) -> None:
        if not self.budget.has_same_plan(self._counted_budget):
            raise self._build_uncounted_error(self._list_changed(COUNTED) or self._list_changed(PLANNED_FLAGS))
        if number >= self.args.trials:
            raise ValueError(
                f"trial={number}: its study has trials of an earlier search, and trials={self.args.trials} counts them "
                "too; raise that, or begin a new study."
            )

    def _list_changed(self, names: Iterable[str]) -> str:
        """Return those of the flags `names` that a trial has changed, as text with their new values."""
        changed = [name for name in names if getattr(self.args, name) != self._original_arguments[name]]
        return ", ".join(f"{name}={getattr(self.args, name)}" for name in changed)

    @staticmethod
    def _build_uncounted_error(changed: str) -> ValueError:
        return ValueError(
            f"{changed}: every trial must release what was counted, from the same rows; leave it out of hp_space."
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """Set up as stock does if `trial` is `None`. Other trials are set up already, and their model must be new."""
        if trial is None:
            super()._hp_search_setup(trial)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the run's folder. The arguments of a trial name its own folder from its beginning."""
        return self.args.output_dir

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        """Train as stock does, then write the card of a trial, because its weights may be saved nowhere."""
        output = super().train(*args, **options)
        self._write_trial_card()
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **options: Any
    ) -> dict:
        """Evaluate as stock does, and write the metrics into the card of a trial that has ended."""
        metrics = super().evaluate(
            eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **options
        )
        if self._final_fingerprint is not None:
            self._write_trial_card()
        return metrics

    def _write_trial_card(self) -> None:
        if self.hp_search_backend is not None and self.args.should_save:
            self._write_card(Path(self.args.output_dir), self._fingerprint())

    def _refuse_changed_weights(self) -> None:
        if self.model is None:
            raise ValueError("model: a search keeps none; publish the folder of its best trial, or replay its log.")
        super()._refuse_changed_weights()


def _check_hp_space(hp_space: Callable | None) -> Callable | None:
    """Wrap `hp_space` so that it raises `ValueError` unless it returns a mapping, which stock assumes."""
    if hp_space is None:
        return None

    def checked(trial: Any) -> Mapping[str, Any]:
        values = hp_space(trial)
        if not isinstance(values, Mapping):
            raise ValueError(f"hp_space: it returned {type(values).__name__}; return a dict of what the trial sets.")
        return values

    return checked
