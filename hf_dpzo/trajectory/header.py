"""The header of a log, read from bytes that a stranger may have written.

`schemas/trajectory-header.json` alone says what a header may hold. Code that has a parsed header need not check types,
sizes and ranges again.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hf_dpzo.io.strict_json import find_fault, parse_json


# An honest header has a few thousand bytes; one that names 10000 parameters has half of this.
MAX_HEADER_BYTES = 1 << 20


# The steps of all trials together: more than the accountants are ever asked about.
MAX_STEPS = 10_000_000


# An honest header has five levels: adapter, config, rank_pattern, module, and the header itself.
_MAX_DEPTH = 8


DEFAULT_REMEDY = "use a copy of the log that nobody changed, or the version of hf_dpzo that wrote it"


class TrajectoryError(ValueError):
    """A log that cannot be read, or that belongs to another run."""


def parse_header(data: bytes, *, remedy: str = DEFAULT_REMEDY) -> dict[str, Any]:
    """Parse the header in `data`, which is JSON, and check it against the schema.

    Args:
        data: the bytes of the header, as they are or will be in a file.
        remedy: the end of the error's sentence: what to do about it.

    Raises:
        TrajectoryError: `data` holds no header, or one that no run writes.
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
    """Raise if `header` holds an infinite number, or is so deep that a recursive walk through it could fail."""
    level = [header]
    for _ in range(_MAX_DEPTH):
        if not all(math.isfinite(value) for value in level if isinstance(value, float)):
            raise TrajectoryError("header: it holds a number that is too large for float64")
        level = [inner for value in level for inner in _list_children(value)]
    if level:
        raise TrajectoryError(f"header: it has more than {_MAX_DEPTH} levels")


def _list_children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _check_consistency(header: Mapping[str, Any]) -> None:
    """Raise if two parts of `header` contradict each other."""
    names = [name for group in header["groups"] for name in group["parameters"]]
    if len(set(names)) < len(names):
        raise TrajectoryError("groups: a parameter is in them twice")
    if not {*header.get("scales", ())} <= {*names}:
        raise TrajectoryError("scales: they are of parameters that are in no group")
    if not names:
        raise TrajectoryError("groups: there is no parameter in them")
    if header["rows"]["privacy_unit_column"] is None and header["rows"]["rows"] is None:
        raise TrajectoryError("rows.rows=null: each row is a unit, and their number is public")
    trials = header["plan"].get("trials", 1)
    steps = header["plan"]["steps"]
    if trials * steps > MAX_STEPS:
        raise TrajectoryError(f"plan.trials={trials}: with {steps} steps each they are more than {MAX_STEPS}")
    for name in ("earlier", "report"):
        others = sum(release["count"] for release in header["plan"].get(name, ()))
        if others > MAX_STEPS:
            raise TrajectoryError(f"plan.{name}: they are {others} steps, more than {MAX_STEPS}")
    directions = header["method"].get("num_directions", 1)
    if directions != header["num_directions"]:
        raise TrajectoryError(f"num_directions={header['num_directions']}: the method has {directions} a step")
