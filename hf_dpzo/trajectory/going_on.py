"""What the run that goes on from a log must have in common with it, and what it takes over from its header."""

from collections.abc import Mapping
from typing import Any

from hf_dpzo.trajectory.header import TrajectoryError


def list_trained_names(header: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters that a run trains."""
    return [name for group in header["groups"] for name in group["parameters"]]


def trains_first_factor(header: Mapping[str, Any]) -> bool:
    """Return whether a run trains A, the first matrix of LoRA.

    >>> trains_first_factor({"groups": [{"parameters": ["q.lora_A.default.weight", "q.lora_B.default.weight"]}]})
    True
    """
    return any(".lora_A." in name for name in list_trained_names(header))


def refuse_other_parameters(begun: Mapping[str, Any], header: Mapping[str, Any], folder: object) -> None:
    """Raise `TrajectoryError` if the run with `header` trains others than the run in `folder`, which `begun` with."""
    there, here = list_trained_names(begun), list_trained_names(header)
    if {*there} == {*here}:
        return
    missing, added = [name for name in there if name not in here], [name for name in here if name not in there]
    what, first, count = ("trains", missing[0], len(missing)) if missing else ("does not train", added[0], len(added))
    others = f" and {count - 1} more" if count > 1 else ""
    remedy = "train the same parameters"
    if trains_first_factor(begun) != trains_first_factor(header):
        value = "false" if trains_first_factor(begun) else "true"
        remedy = f"set lora_freeze_a: {value} in a recipe, or freeze_a={value.title()} in seeded_peft_model"
    raise TrajectoryError(
        f"resume_from_checkpoint: the run in {folder} {what} {first}{others}, other than this one; {remedy}, or start "
        "a new run in another folder."
    )


def take_over(header: dict[str, Any], begun: Mapping[str, Any]) -> dict[str, Any]:
    """Return `header` with what the log keeps from its beginning, whatever it is where the run goes on.

    A run may be resumed on another machine, or with other versions. The logs of earlier versions have the number of
    rows also where users are the units, and no seed where a part of an adapter was frozen, whose values are compared.
    """
    if header["adapter"] is not None and (begun["adapter"] or {"seed": 0})["seed"] is None:
        header = header | {"adapter": header["adapter"] | {"seed": None}}
    calibrations = header.get("calibration"), begun.get("calibration")
    if all(calibrations) and calibrations[0]["texts"] == calibrations[1]["texts"]:
        header = header | {"calibration": begun["calibration"]}  # Another device rounds otherwise.
    header = _take_over_recipe(header, begun)
    rows = header["rows"]
    if rows["privacy_unit_column"] is not None:
        rows = rows | {"rows": begun["rows"]["rows"]}
    return header | {"made_with": begun["made_with"], "rows": rows}


def _take_over_recipe(header: dict[str, Any], begun: Mapping[str, Any]) -> dict[str, Any]:
    """Return `header` without a recipe if the log of an earlier version has none, and with the log's if Python goes on.

    >>> _take_over_recipe({"recipe": {"task": "chat"}}, {}), _take_over_recipe({}, {"recipe": {"task": "chat"}})
    ({}, {'recipe': {'task': 'chat'}})
    """
    if "recipe" not in begun:
        return {name: value for name, value in header.items() if name != "recipe"}
    return {"recipe": begun["recipe"], **header}
