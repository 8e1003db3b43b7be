"""A run, and the header of its log: each made from the other."""

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from hf_dpzo.io.strict_json import differences
from hf_dpzo.methods import METHODS, Method
from hf_dpzo.models.fingerprints import frozen_fingerprint, shapes_fingerprint
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.queries import Query
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import adapter_of, base_of
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.updates import UPDATES, Update


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What follows from a log.

    Args:
        header: of the log.
        method: with its parameters.
        update: what became of released coefficients.
        budget: the plan, and the ledger of the steps that were taken.
    """

    header: Mapping[str, Any]
    method: Method
    update: Update
    budget: Budget

    @classmethod
    def of(cls, log: Trajectory) -> Self:
        """Return the run that `log` is of.

        Raises:
            TrajectoryError: it plans for releases that its method does not make.
        """
        header, plan = log.header, log.header["plan"]
        method = made(METHODS, header["method"])
        run = cls(
            header=header,
            method=method,
            update=made(UPDATES, header["update"]),
            budget=Budget(
                query=_query(header, method),
                planned_steps=plan["steps"],
                delta=plan["delta"],
                trials=plan.get("trials", 1),
            ),
        )
        run.budget.ledger.append(run.budget.query, count=min(plan["steps"], len(log.records) + (log.torn > 0)))
        return run

    @property
    def method_name(self) -> str:
        """The method's name in `METHODS`."""
        return self.header["method"]["name"]

    @property
    def rows(self) -> int:
        """How many rows the training data had."""
        return self.header["rows"]["rows"]

    @property
    def units(self) -> int:
        """How many units of privacy they made."""
        return self.header["rows"]["units"]

    @property
    def expected_batch_size(self) -> int:
        """Units in a batch, on average."""
        return self.header["rows"]["expected_batch_size"]

    @property
    def sampling_rate(self) -> float:
        """The probability with which each unit joined a batch."""
        return self.expected_batch_size / self.units

    @property
    def unit_column(self) -> str | None:
        """The column that says whose a row is; `None` where the unit is a row."""
        return self.header["rows"]["privacy_unit_column"]

    @property
    def max_rows_per_unit(self) -> int | None:
        """How many rows of a unit a batch held at most; `None` where the unit is a row."""
        return self.header["rows"]["max_rows_per_unit"]

    @property
    def padded_lengths(self) -> list[int] | None:
        """The public lengths that rows were padded to."""
        return self.header["rows"]["padded_lengths"]

    @property
    def unit_name(self) -> str:
        """What a unit of privacy is called."""
        return "row" if self.unit_column is None else "user"

    @property
    def unit_in_words(self) -> str:
        """What a unit of privacy is."""
        if self.unit_column is None:
            return "one row of the training data"
        return (
            f"all rows of one user (column {self.unit_column}), of which a batch holds at most "
            f"{self.max_rows_per_unit}, as one clipped mean"
        )


def _query(header: Mapping[str, Any], method: Method) -> Query:
    """What one step released, as the method says; not as the header does, which must agree."""
    rows, planned = header["rows"], header["plan"]["query"]
    query = method.mechanism.query(rows["expected_batch_size"] / rows["units"])
    different = differences(planned, {"name": type(query).__name__, **asdict(query)})
    if different:
        raise TrajectoryError(f"plan: it is not of {header['method']['name']}: {'; '.join(different[:3])}.")
    return query


ANYWHERE = "any kind of device"


def header_of(
    *,
    model: torch.nn.Module,
    optimizer: ZOOptimizer,
    method: Method,
    update: Update,
    budget: Budget,
    rows: dict[str, Any],
    initial: str | None,
    made_with: dict[str, Any],
) -> dict[str, Any]:
    """Return the header of a run's log: public facts, and all that a replay needs.

    Args:
        model: as it is trained, with its adapter.
        optimizer: which has its parameters.
        method: with its noise set.
        update: what becomes of released coefficients.
        budget: the plan.
        rows: how many units of privacy they make, and how they are drawn and evaluated.
        initial: the fingerprint of the initial values; `None` where it is not known any more.
        made_with: what may differ where the run goes on: what the probe measured, and versions.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {names[id(parameter)]: parameter for parameter in optimizer.parameters()}
    return json.loads(
        json.dumps(
            {
                "base": {**base_of(model), "frozen": frozen_fingerprint(model, trained.values())},
                "adapter": adapter_of(model),
                "trained": {"shapes": shapes_fingerprint(trained), "initial": initial},
                "method": {"name": _name_in(METHODS, method), **dataclasses.asdict(method)},
                "num_directions": method.estimator.num_directions,
                "update": {"name": _name_in(UPDATES, update), **dataclasses.asdict(update)},
                "directions": {"name": _name_in(DIRECTIONS, optimizer.directions), "seed": optimizer.directions.seed},
                "groups": [
                    {"weight_decay": group["weight_decay"], "parameters": [names[id(p)] for p in group["params"]]}
                    for group in optimizer.param_groups
                ],
                "plan": {
                    "steps": budget.planned_steps,
                    "delta": budget.delta,
                    **({"trials": budget.trials} if budget.trials > 1 else {}),
                    "query": {"name": type(budget.query).__name__, **dataclasses.asdict(budget.query)},
                },
                "rows": rows,
                "replays_on": _replays_on(method, update, optimizer),
                "made_with": made_with,
            }
        )
    )


def remembers(method: Method, update: Update) -> bool:
    """Whether a step depends on more than the parameters: on moments, on where a stage began, or on a mask."""
    return update.remembers or method.constraint.remembers or method.pruning(0) is not None


def made(known: dict[str, type], described: dict[str, Any]) -> Any:
    """The dataclass that a header describes."""
    name, values = described["name"], {name: value for name, value in described.items() if name != "name"}
    if name not in known:
        raise TrajectoryError(f"name={name}: this version has only {', '.join(known)}; use a newer one.")
    try:
        return known[name](**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    except TypeError:
        raise TrajectoryError(
            f"name={name}: it has not the parameters {', '.join(values)}; use the version that wrote the log."
        ) from None


def _name_in(known: dict[str, type], one: Any) -> str:
    return next(name for name, kind in known.items() if type(one) is kind)


def _replays_on(method: Method, update: Update, optimizer: ZOOptimizer) -> str:
    """Where a sweep is one addition for each coordinate, whatever computes it makes the same bits."""
    portable = _name_in(DIRECTIONS, optimizer.directions) == "rademacher" and not remembers(method, update)
    return ANYWHERE if portable else _kind(optimizer.parameters()[0].device)


def _kind(device: torch.device) -> str:
    return f"{device.type} on {platform.machine()}"
