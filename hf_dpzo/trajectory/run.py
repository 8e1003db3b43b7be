"""A run, and the header of its log: each built from the other."""

import dataclasses
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.methods import METHODS, Method
from hf_dpzo.models.adapters import name_as_published
from hf_dpzo.models.fingerprints import fingerprint_frozen, fingerprint_shapes
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.queries import QUERY_CLASSES, Query, Releases
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import describe_adapter, describe_base_model
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.updates import UPDATES, Update


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run, as its log describes it.

    Args:
        header: the header of the log.
        method: the method, with its parameters.
        update: the update rule that turned released coefficients into steps.
        budget: the plan, and the ledger of the steps that were taken.
    """

    header: Mapping[str, Any]
    method: Method
    update: Update
    budget: Budget

    @classmethod
    def from_log(cls, log: Trajectory) -> Self:
        """Return the run that `log` describes. A torn record counts as a step.

        Raises:
            TrajectoryError: the header plans for releases that its method does not make.
        """
        header, plan = log.header, log.header["plan"]
        method = from_header(METHODS, header["method"])
        run = cls(
            header=header,
            method=method,
            update=from_header(UPDATES, header["update"]),
            budget=Budget(
                query=_build_query(header, method),
                planned_steps=plan["steps"],
                delta=plan["delta"],
                trials=plan.get("trials", 1),
                earlier=_read_releases(plan.get("earlier", ())),
                report=_read_releases(plan.get("report", ())),
            ),
        )
        run.budget.ledger.append(run.budget.query, count=min(plan["steps"], len(log.records) + (log.torn_bytes > 0)))
        return run

    @property
    def method_name(self) -> str:
        """The name of the method in `METHODS`."""
        return self.header["method"]["name"]

    @property
    def num_rows(self) -> int | None:
        """The number of rows of the training data; `None` if it is not published, because users are the units."""
        return self.header["rows"]["rows"]

    @property
    def num_units(self) -> int:
        """The number of units of privacy in the training data."""
        return self.header["rows"]["units"]

    @property
    def expected_batch_size(self) -> int:
        """The number of units in a batch, on average."""
        return self.header["rows"]["expected_batch_size"]

    @property
    def sampling_rate(self) -> float:
        """The probability with which each unit took part in a batch."""
        return self.expected_batch_size / self.num_units

    @property
    def unit_column(self) -> str | None:
        """The column that says whose a row is; `None` if the unit is a row."""
        return self.header["rows"]["privacy_unit_column"]

    @property
    def max_rows_per_unit(self) -> int | None:
        """The largest number of rows of one unit in a batch; `None` if the unit is a row."""
        return self.header["rows"]["max_rows_per_unit"]

    @property
    def padded_lengths(self) -> list[int] | None:
        """The public lengths that rows were padded to, in tokens; `None` if there were none."""
        return self.header["rows"]["padded_lengths"]

    @property
    def num_canaries(self) -> int:
        """The number of canaries among the rows, each of which may be a row without content."""
        return self.header["rows"].get("canaries", {}).get("count", 0)

    @property
    def unit_name(self) -> str:
        """The word for a unit of privacy."""
        return "row" if self.unit_column is None else "user"

    @property
    def unit_description(self) -> str:
        """A phrase that says what a unit of privacy is."""
        if self.unit_column is None:
            return "one row of the training data"
        return (
            f"all rows of one user (column {self.unit_column}), of which a batch holds at most "
            f"{self.max_rows_per_unit}, as one clipped mean"
        )


def _build_query(header: Mapping[str, Any], method: Method) -> Query:
    """Return the query of one step from the method itself, because the header, which must agree, is not trusted."""
    rows, planned = header["rows"], header["plan"]["query"]
    query = method.mechanism.query(rows["expected_batch_size"] / rows["units"])
    different = compare_json(planned, {"name": type(query).__name__, **asdict(query)})
    if different:
        raise TrajectoryError(f"plan: it is not of {header['method']['name']}: {'; '.join(different[:3])}.")
    return query


def describe_releases(releases: Releases) -> list[dict[str, Any]]:
    """Return `releases` in JSON types."""
    return [{"name": type(query).__name__, **asdict(query), "count": count} for query, count in releases]


def _read_releases(described: Iterable[Mapping[str, Any]]) -> Releases:
    return tuple(
        (QUERY_CLASSES[one["name"]](**{key: one[key] for key in one if key not in ("name", "count")}), one["count"])
        for one in described
    )


ANYWHERE = "any kind of device"


def build_header(
    *,
    model: torch.nn.Module,
    optimizer: ZOOptimizer,
    method: Method,
    update: Update,
    budget: Budget,
    rows: dict[str, Any],
    initial: str | None,
    environment: dict[str, Any],
    began_from: dict[str, Any] | None = None,
    counted: Sequence[str] = (),
    calibration: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the header of a run's log: public facts, and all that a replay needs.

    Args:
        model: the model as it is trained, with its adapter.
        optimizer: the optimizer of its trained parameters.
        method: the method, with its noise multiplier set.
        update: the update rule that turns released coefficients into steps.
        budget: the plan.
        rows: public facts about the training data: the number of units of privacy, and how they are drawn and
            evaluated.
        initial: the fingerprint of the initial values; `None` if it is no longer known.
        began_from: the epsilon and the delta of the run that made what this one begins with, if one is known.
        counted: the checksums of the logs of earlier runs that the plan counts.
        calibration: what is taken off the scores of label words; `None` for nothing.
        recipe: what the model needs to be used; `None` where Python code made the run.
        environment: the probe's isolation, the versions, the kind of device and the number of processes, all of which
            may differ when the run is resumed elsewhere.
    """
    named = name_as_published(model, dict(model.named_parameters()))
    names = {id(parameter): name for name, parameter in named.items()}
    trained = {names[id(parameter)]: parameter for parameter in optimizer.parameters()}
    scales = {name: s for name, s in zip(trained, optimizer.directions.scales, strict=True) if s != 1}
    return json.loads(
        json.dumps(
            {
                "base": {**describe_base_model(model), "frozen": fingerprint_frozen(model, trained.values())},
                "adapter": describe_adapter(model),
                "trained": {"shapes": fingerprint_shapes(trained), "initial": initial},
                "method": {"name": _find_name(METHODS, method), **dataclasses.asdict(method)},
                "num_directions": method.estimator.num_directions,
                "update": {"name": _find_name(UPDATES, update), **dataclasses.asdict(update)},
                "directions": {"name": _find_name(DIRECTIONS, optimizer.directions), "seed": optimizer.directions.seed},
                "groups": [
                    {"weight_decay": group["weight_decay"], "parameters": [names[id(p)] for p in group["params"]]}
                    for group in optimizer.param_groups
                ],
                **({"scales": scales} if scales else {}),
                "plan": {
                    "steps": budget.planned_steps,
                    "delta": budget.delta,
                    **({"trials": budget.trials} if budget.trials > 1 else {}),
                    **({"earlier": describe_releases(budget.earlier)} if budget.earlier else {}),
                    **({"report": describe_releases(budget.report)} if budget.report else {}),
                    "query": {"name": type(budget.query).__name__, **dataclasses.asdict(budget.query)},
                },
                "rows": rows,
                **({} if began_from is None else {"began_from": began_from}),
                **({"counted": list(counted)} if counted else {}),
                **({} if calibration is None else {"calibration": calibration}),
                **({} if recipe is None else {"recipe": recipe}),
                "replays_on": _choose_replay_device(method, update, optimizer),
                "made_with": environment,
            }
        )
    )


def is_stateful(method: Method, update: Update) -> bool:
    """Return whether a step depends on more than the parameters: on moments, the start of a stage, or a mask."""
    return update.is_stateful or method.constraint.is_stateful or method.pruning(0) is not None


def from_header(classes: dict[str, type], description: dict[str, Any]) -> Any:
    """Return the object that `description` in a header stands for, of one of `classes`.

    Raises:
        TrajectoryError: this version has no such class, or the class has other parameters.
    """
    name = description["name"]
    values = {key: value for key, value in description.items() if key != "name"}
    if name not in classes:
        raise TrajectoryError(f"name={name}: this version has only {', '.join(classes)}; use a newer one.")
    try:
        return classes[name](**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    except TypeError:
        raise TrajectoryError(
            f"name={name}: it has not the parameters {', '.join(values)}; use the version that wrote the log."
        ) from None


def _find_name(classes: dict[str, type], instance: Any) -> str:
    return next(name for name, named_class in classes.items() if type(instance) is named_class)


def _choose_replay_device(method: Method, update: Update, optimizer: ZOOptimizer) -> str:
    # If a sweep is one addition for each coordinate, every device computes the same bits.
    portable = _find_name(DIRECTIONS, optimizer.directions) == "rademacher" and not is_stateful(method, update)
    return ANYWHERE if portable else describe_device(optimizer.parameters()[0].device)


def describe_device(device: torch.device) -> str:
    """Return the kinds of device and machine, such as "cpu on x86_64"."""
    return f"{device.type} on {platform.machine()}"
