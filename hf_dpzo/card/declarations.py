"""What a log can not tell of a run, and is taken at its word."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from hf_dpzo.trajectory.log import Trajectory


PACKAGES = ("hf_dpzo", "dp-accounting", "opendp", "torch", "transformers", "accelerate", "peft", "datasets")


@dataclass(frozen=True, kw_only=True)
class Declarations:
    """What a log can not tell.

    Args:
        isolation: how far the probe found the rows of a batch kept apart: its status, and a bound in clip norms.
        audit: what an attack on the mechanism found; `None` where none was made.
        weights: of what is trained: SHA-256, bytes, parameters, and after how many steps; `None` where not known.
        tuning_runs: how many runs on the same rows choices were made from, this one among them; `None` if not told.
        eval_data_is_public: whether the evaluation data were declared public.
        metrics: of the last evaluation of the weights.
        metrics_step: how many steps these had taken; `None` where they were not evaluated.
        history: metrics by step, where the evaluation data are public.
        hyperparameters: what else the card lists of how the model was trained.
        dataset: names of the training data.
        task: what is learned, by its name on the Hub.
        repository: where the model is published; `None` where it is not.
        versions: of the software.
    """

    isolation: Mapping[str, Any]
    audit: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] | None = None
    tuning_runs: int | None = None
    eval_data_is_public: bool = False
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metrics_step: int | None = None
    history: Sequence[Mapping[str, float]] = ()
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: Sequence[str] = ()
    task: str | None = None
    repository: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_statement(cls, statement: Mapping[str, Any]) -> Self:
        """What a statement declares."""
        checks, training, evaluation = statement["validity_checks"], statement["training"], statement["evaluation"]
        return cls(
            isolation=checks["numerical_isolation"],
            audit=checks["audit"],
            weights=statement["reproducibility"]["weights"],
            tuning_runs=statement["tuning"]["runs_on_private_data"],
            eval_data_is_public=evaluation["data_are_public"],
            metrics=evaluation["metrics"],
            metrics_step=evaluation["after_step"],
            history=evaluation["history"],
            hyperparameters=training["hyperparameters"],
            dataset=training["dataset"],
            task=training["task"],
            repository=statement["reproducibility"]["repository"],
            versions=statement["versions"],
        )

    @classmethod
    def from_log(cls, log: Trajectory) -> Self:
        """What is known where nobody declared anything."""
        made_with = log.header["made_with"]
        return cls(isolation=made_with["isolation"], versions=made_with["versions"])


@cache
def _versions() -> Mapping[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**found, "python": platform.python_version()}


def collect_versions() -> dict[str, str]:
    """Of the software that this process runs. They are read once: what is installed meanwhile does not run here."""
    return dict(_versions())
