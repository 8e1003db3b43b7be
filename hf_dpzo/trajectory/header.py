"""The header of a log, read from bytes that anybody may have written.

What a header may hold is said once, in `schemas/trajectory-header.json`. Whoever has read one need not look again at
types, sizes and ranges.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hf_dpzo.io.strict_json import find_fault, parse_json


# Bytes. An honest header has a few thousand; one that names 10000 parameters has half of this.
MAX_HEADER_BYTES = 1 << 20


# Of all trials together: more than the accountants are asked about.
MAX_STEPS = 10_000_000


# An honest header has five levels: adapter, config, rank_pattern, module, and the header itself.
_MAX_DEPTH = 8


DEFAULT_REMEDY = "use a copy of the log that nobody changed, or the version of hf_dpzo that wrote it"


class TrajectoryError(ValueError):
    """A log that can not be read, or that belongs to another run."""


def parse_header(data: bytes, *, remedy: str = DEFAULT_REMEDY) -> dict[str, Any]:
    """Return the header that `data` holds, in JSON, of the shape that the schema asks for.

    Args:
        data: what a file holds, or will hold.
        remedy: how the sentence ends that is raised.

    Raises:
        TrajectoryError: it holds none, or one that no run has.
    """
    try:
        return _parse_checked(data)
    except TrajectoryError as error:
        raise TrajectoryError(f"{error}; {remedy}.") from None


def _parse_checked(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_HEADER_BYTES:
        raise TrajectoryError(f"header: it has {len(data)} bytes, and {MAX_HEADER_BYTES} are the most")
    try:
        header = parse_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"header: it is no JSON that a run writes ({type(error).__name__})") from None
    _check_values(header)
    fault = find_fault(header, "trajectory-header.json")
    if fault is not None:
        raise TrajectoryError(fault)
    _check_consistency(header)
    return header


def _check_values(header: Any) -> None:
    """Raise where `header` holds an infinite number, or is so deep that whoever walks through it could fail."""
    level = [header]
    for _ in range(_MAX_DEPTH):
        if not all(math.isfinite(one) for one in level if isinstance(one, float)):
            raise TrajectoryError("header: it holds a number that is too large for float64")
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise TrajectoryError(f"header: it has more than {_MAX_DEPTH} levels")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _check_consistency(header: Mapping[str, Any]) -> None:
    """Raise where two parts of `header` contradict each other."""
    names = [name for group in header["groups"] for name in group["parameters"]]
    if len(set(names)) < len(names):
        raise TrajectoryError("groups: a parameter is in them twice")
    if not names:
        raise TrajectoryError("groups: there is no parameter in them")
    trials, steps = header["plan"].get("trials", 1), header["plan"]["steps"]
    if trials * steps > MAX_STEPS:
        raise TrajectoryError(f"plan.trials={trials}: with {steps} steps each they are more than {MAX_STEPS}")
    directions = header["method"].get("num_directions", 1)
    if directions != header["num_directions"]:
        raise TrajectoryError(f"num_directions={header['num_directions']}: the method has {directions} a step")
