"""The parts of a run that went on in another environment, in words."""

from collections.abc import Mapping, Sequence
from typing import Any


def describe_parts(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each part: from which step on it held, where it ran, and what versions others did not have.

    There are none if parts differ in the bound on isolation alone, because the card states the worst of these anyway.

    Args:
        parts: the parts, as a statement lists them; none if the run had only one.

    >>> isolation = {"status": "bounded", "bound_in_clip_norms": 0.002}
    >>> first = {"first_step": 0, "isolation": isolation, "device": "cpu on x86_64", "processes": 1}
    >>> later = {**first, "first_step": 7, "processes": 2, "versions": {"torch": "2.1"}}
    >>> for line in describe_parts([{**first, "versions": {"torch": "2.0"}}, later]):
    ...     line
    'from step 0 on: cpu on x86_64, in 1 process, rows isolated up to 0.002 clip norms, torch 2.0'
    'from step 7 on: cpu on x86_64, in 2 processes, rows isolated up to 0.002 clip norms, torch 2.1'
    """
    if all(_list_facts(part) == _list_facts(parts[0]) for part in parts):
        return []
    return [f"from step {part['first_step']} on: {', '.join(_describe_part(part, parts))}" for part in parts]


def _list_facts(part: Mapping[str, Any]) -> tuple:
    return part["isolation"]["status"], part["versions"], part["device"], part["processes"]


def _describe_part(part: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> list[str]:
    words = [] if part["device"] is None else [part["device"]]
    if part["processes"] is not None:
        words.append("in 1 process" if part["processes"] == 1 else f"in {part['processes']} processes")
    isolation = part["isolation"]
    words.append(
        f"rows isolated up to {isolation['bound_in_clip_norms']} clip norms"
        if isolation["status"] == "bounded"
        else f"isolation of rows {isolation['status']}"
    )
    versions = part["versions"].items()
    return [*words, *(f"{name} {own}" for name, own in versions if any(p["versions"].get(name) != own for p in parts))]
