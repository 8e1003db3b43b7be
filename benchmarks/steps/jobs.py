"""From a plan to the jobs that a worker is given, and to what each result is called in the table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


Plan = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One process.

    Args:
        case: what is compared with each other has the same.
        round: from 0.
        contenders: what each job's result is called.
        jobs: for the worker. More than one are measured in the same process.
    """

    case: str
    round: int
    contenders: tuple[str, ...]
    jobs: tuple[dict[str, Any], ...]

    @property
    def rows(self) -> list[tuple[str, int, str]]:
        """What identifies the results."""
        return [(self.case, self.round, contender) for contender in self.contenders]


def turns(plan: Plan) -> Iterator[Turn]:
    """All processes of a plan, in the order in which they run."""
    for case in plan["cases"]:
        for number in range(max(case["contenders"].values())):
            names = [name for name, rounds in case["contenders"].items() if number < rounds]
            shift = number % len(names)  # So that each comes first, and after each other, now and then.
            for name in names[shift:] + names[:shift]:
                job = job_of(plan, case, name)
                yield Turn(case=title(case), round=number, contenders=(name,), jobs=(job,))
    for number in range(plan["scaling"]["rounds"]):
        for name, axis in plan["scaling"]["axes"].items():
            values = axis["values"] if number % 2 == 0 else axis["values"][::-1]
            jobs = tuple(point_of(plan, name, axis, value) for value in values)
            yield Turn(case=f"scaling/{name}", round=number, contenders=tuple(map(str, values)), jobs=jobs)


def title(case: Mapping[str, Any]) -> str:
    """What a case is called."""
    return "/".join(filter(None, (case["model"], case["trained"], case["batch"], case.get("loss"))))


def baseline_of(plan: Plan, case: Mapping[str, Any]) -> str:
    """The contender that a case's others are compared with."""
    return case.get("baseline", plan["baseline"])


def job_of(plan: Plan, case: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the worker is told, for one contender of a case."""
    model, contender = plan["models"][case["model"]], plan["contenders"][name]
    rows, tokens = (int(number) for number in case["batch"].split("x"))
    return {
        "model": model,
        "trained": case["trained"],
        "rows": rows,
        "tokens": tokens,
        "loss": contender.get("loss", case.get("loss", model["loss"])),
        "kind": contender["kind"],
        "options": contender.get("options", {}),
        "steps": case["steps"],
        "threads": plan["threads"],
    }


def point_of(plan: Plan, name: str, axis: Mapping[str, Any], value: int) -> dict[str, Any]:
    """What the worker is told, for one point on an axis along which the cost of `ours` is followed."""
    model, point = dict(plan["models"][plan["scaling"]["model"]]), {**axis, name: value}
    if "layers" in point:
        model["config"] = {**model["config"], "num_hidden_layers": point["layers"]}
    options = dict(axis.get("options", {}))
    if "num_directions" in point:
        options["num_directions"] = point["num_directions"]
    return {
        "model": model,
        **{one: point[one] for one in ("rows", "tokens", "trained")},
        "loss": model["loss"],
        "kind": "ours",
        "options": options,
        "steps": plan["scaling"]["steps"],
        "threads": plan["threads"],
    }
