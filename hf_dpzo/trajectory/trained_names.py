"""Which parameters a run trains, by its header, compared with those of the run that would go on from it."""

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
