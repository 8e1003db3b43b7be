"""The facts about a run that its log cannot tell. They are declared, and not checked."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from hf_dpzo._version import __version__
from hf_dpzo.trajectory.log import Trajectory


PACKAGES = ("dp-accounting", "opendp", "torch", "transformers", "accelerate", "peft", "datasets")


# What computes a claim again, and where it is to be had.
SOFTWARE = {
    "name": "hf_dpzo",
    "url": "https://github.com/hf-dpzo/hf_dpzo",
    "install": "pip install hf_dpzo",
}


@dataclass(frozen=True, kw_only=True)
class Declarations:
    """The facts that a log cannot tell.

    Args:
        isolation: the isolation of the rows of a batch, as probed: its status, and a bound in clip norms.
        audit: the result of an attack on the mechanism; `None` if there was no attack.
        empirical: the result of an audit of the run itself; `None` if there was none, or it is not published.
        weights: facts about the trained weights: SHA-256, bytes, parameters and steps taken; `None` if not known.
        tuning_runs: the number of runs on the same rows that choices were made from, with this one; `None` if not
            declared.
        eval_data_is_public: whether the evaluation data were declared public.
        metrics: the metrics of the last evaluation of the weights.
        metrics_step: the number of steps that the evaluated weights had taken; `None` if they were not evaluated.
        history: the metrics by step, if the evaluation data are public.
        hyperparameters: further settings of the training that the card lists.
        dataset: the names of the training data.
        task: the name of the task on the Hub.
        repository: the repository on the Hub that the model is published in; `None` if it is not published.
        versions: the versions of the software.
        data_ledger: what the ledger of the data counted when this was written: runs, and what they come to together;
            `None` if there was no ledger.
        names_software: whether the card says where to get the library. Cards of earlier versions do not.
    """

    isolation: Mapping[str, Any]
    audit: Mapping[str, Any] | None = None
    empirical: Mapping[str, Any] | None = None
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
    data_ledger: Mapping[str, Any] | None = None
    names_software: bool = False

    @property
    def counted_runs(self) -> int | None:
        """How many runs the ledger of the data counts; `None` without one, or for a card that does not say so."""
        return self.data_ledger["runs"] if self.names_software and self.data_ledger is not None else None

    @classmethod
    def from_statement(cls, statement: Mapping[str, Any]) -> Self:
        """Return the facts that `statement` declares."""
        checks = statement["validity_checks"]
        training = statement["training"]
        evaluation = statement["evaluation"]
        return cls(
            isolation=checks["numerical_isolation"],
            audit=checks["audit"],
            empirical=checks.get("empirical"),
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
            data_ledger=statement.get("data_ledger"),
            names_software="software" in statement,
        )

    @classmethod
    def from_log(cls, log: Trajectory) -> Self:
        """Return the facts that `log` itself holds, for a run of which nothing was declared."""
        environment = log.header["made_with"]
        return cls(isolation=environment["isolation"], versions=environment["versions"], names_software=True)


@cache
def _versions() -> Mapping[str, str]:
    others = {name: importlib.metadata.version(name) for name in PACKAGES}
    # A checkout need not be installed.
    return {"hf_dpzo": __version__, **others, "python": platform.python_version()}


def collect_versions() -> dict[str, str]:
    """Return the versions of the software that this process runs.

    They are read once, because a package that is installed later does not run in this process.
    """
    return dict(_versions())
