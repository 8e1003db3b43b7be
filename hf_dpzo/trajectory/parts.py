"""The parts of a run that went on in another environment than it began in: on another machine, or with other versions.

The header of the log has the environment that the run began in. Each later part of another one is an entry in a file
beside the log, which is on disk before the part's first release. The record of its first step says in the log itself
that a part begins there, so that the file cannot be left out.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dpzo.io.files import open_plain, write_atomically
from hf_dpzo.io.foreign import one_sentence
from hf_dpzo.io.strict_json import find_fault, parse_json
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory


PARTS_FILE = "parts.json"


# The largest file that is read, in bytes: thousands of parts.
MAX_PARTS_BYTES = 1 << 22


_SCHEMA = "hf-dpzo/parts@1"


_REMEDY = "bring back the file that was beside the log; a checkpoint has a copy"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a run, from its first step to that of the next part.

    Args:
        first_step: the number of its first step, from 0.
        environment: what held for it: the isolation of rows, versions, the kind of device, and the number of processes.
    """

    first_step: int
    environment: Mapping[str, Any]


def is_covered(environment: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Return whether what is known of the part before, in environment `last`, holds in `environment` too.

    The isolation of rows is measured at each start, at other weights, so its bound is never quite the same. A smaller
    one is nothing new.
    """
    isolation, known = environment["isolation"], last["isolation"]
    is_no_worse = (isolation["bound_in_clip_norms"] or 0.0) <= (known["bound_in_clip_norms"] or 0.0)
    return {**environment, "isolation": isolation["status"]} == {**last, "isolation": known["status"]} and is_no_worse


def list_parts(folder: Path, log: Trajectory) -> tuple[Part, ...]:
    """Return all parts of the run whose `log` is in `folder`, the first of them as the header has it.

    A part that no release came from is left out. A torn record counts as a release.

    Raises:
        TrajectoryError: see `read_later_parts`.
    """
    spent = len(log.records) + (log.torn_bytes > 0)
    later = (part for part in read_later_parts(folder, log) if part.first_step < spent)
    return Part(first_step=0, environment=log.header["made_with"]), *later


def read_later_parts(folder: Path, log: Trajectory) -> tuple[Part, ...]:
    """Return the parts that the file beside `log` holds, in order; none if there is no file.

    A kill after an entry and before its first release leaves a last one that the log does not have yet.

    Raises:
        TrajectoryError: the file is not what a run writes, or has not the parts that the log says there are.
    """
    path = folder / PARTS_FILE
    with one_sentence(str(path), TrajectoryError, remedy=_REMEDY):
        parts = _parse(_read(path)) if os.path.lexists(path) else ()
    begun = [part.first_step for part in parts if part.first_step < len(log.records)]
    if begun != list(log.part_starts) or any(part.first_step > len(log.records) for part in parts):
        raise TrajectoryError(
            f"{path}: the log has parts that begin with the steps {list(log.part_starts)[:5]}, and this file "
            f"{begun[:5] if parts else 'is not there'}; {_REMEDY}."
        )
    return parts


def write_later_parts(folder: Path, parts: Iterable[Part]) -> None:
    """Write the file beside the log in `folder`, whole or not at all, and wait until it is on disk.

    Raises:
        TrajectoryError: no reader would accept it.
        OSError: the folder cannot be written to.
    """
    entries = [{"first_step": part.first_step, **part.environment} for part in parts]
    data = json.dumps({"schema": _SCHEMA, "parts": entries}, indent=1, sort_keys=True, allow_nan=False).encode()
    _parse(data)
    write_atomically(folder / PARTS_FILE, data)


def _read(path: Path) -> bytes:
    with open(open_plain(path), "rb") as file:
        return file.read(MAX_PARTS_BYTES + 1)


def _parse(data: bytes) -> tuple[Part, ...]:
    if len(data) > MAX_PARTS_BYTES:
        raise TrajectoryError(f"parts: they take more than {MAX_PARTS_BYTES} bytes; {_REMEDY}.")
    content = parse_json(data.decode())
    fault = find_fault(content, PARTS_FILE)
    if fault is not None:
        raise TrajectoryError(f"{PARTS_FILE}: {fault}; {_REMEDY}.")
    parts = tuple(
        Part(first_step=entry["first_step"], environment={name: entry[name] for name in entry if name != "first_step"})
        for entry in content["parts"]
    )
    steps = [part.first_step for part in parts]
    if steps != sorted(set(steps)):
        raise TrajectoryError(f"{PARTS_FILE}: its parts are not in the order of their first steps; {_REMEDY}.")
    return parts
