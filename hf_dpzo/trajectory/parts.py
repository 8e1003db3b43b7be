"""The parts of a run that went on in another environment than it began in: on another machine, or with other versions.

The header of the log has the environment that the run began in. Each later part of another one is an entry in a file
beside the log, which is on disk before the part's first release. The record of its first step says in the log itself
that a part begins there, and its checksum is over the entry too: the file can neither be left out nor changed.
"""

import hashlib
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


PARTS_FILE = "parts.json"


# The largest file that is read, in bytes: thousands of parts.
MAX_PARTS_BYTES = 1 << 22


_SCHEMA = "hf-dpzo/parts@1"


PARTS_REMEDY = "bring back the file that was beside the log; a checkpoint has a copy"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a run, from its first step to that of the next part.

    Args:
        first_step: the number of its first step, from 0.
        environment: what held for it: the isolation of rows, versions, the kind of device, and the number of processes.
    """

    first_step: int
    environment: Mapping[str, Any]

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the part's entry, 32 bytes."""
        return hashlib.sha256(json.dumps(self.as_entry(), sort_keys=True).encode()).digest()

    def as_entry(self) -> dict[str, Any]:
        """Return the part's entry in the file, in JSON types."""
        return {"first_step": self.first_step, **self.environment}


def is_covered(environment: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Return whether what is known of the part before, in environment `last`, holds in `environment` too.

    The isolation of rows is measured at each start, at other weights, so its bound is never quite the same. A smaller
    one is nothing new.
    """
    isolation, known = environment["isolation"], last["isolation"]
    is_no_worse = (isolation["bound_in_clip_norms"] or 0.0) <= (known["bound_in_clip_norms"] or 0.0)
    return {**environment, "isolation": isolation["status"]} == {**last, "isolation": known["status"]} and is_no_worse


def read_later_parts(folder: Path) -> tuple[Part, ...]:
    """Return the parts that the file in `folder` holds, in order; none if there is no file.

    Raises:
        TrajectoryError: the file is not what a run writes.
    """
    path = folder / PARTS_FILE
    with one_sentence(str(path), TrajectoryError, remedy=PARTS_REMEDY):
        return _parse(_read(path)) if os.path.lexists(path) else ()


def write_later_parts(folder: Path, parts: Iterable[Part]) -> None:
    """Write the file beside the log in `folder`, whole or not at all, and wait until it is on disk.

    Raises:
        TrajectoryError: no reader would accept it.
        OSError: the folder cannot be written to.
    """
    entries = [part.as_entry() for part in parts]
    data = json.dumps({"schema": _SCHEMA, "parts": entries}, indent=1, sort_keys=True, allow_nan=False).encode()
    _parse(data)
    write_atomically(folder / PARTS_FILE, data)


def _read(path: Path) -> bytes:
    with open(open_plain(path), "rb") as file:
        return file.read(MAX_PARTS_BYTES + 1)


def _parse(data: bytes) -> tuple[Part, ...]:
    if len(data) > MAX_PARTS_BYTES:
        raise TrajectoryError(f"parts: they take more than {MAX_PARTS_BYTES} bytes; {PARTS_REMEDY}.")
    content = parse_json(data.decode())
    fault = find_fault(content, PARTS_FILE)
    if fault is not None:
        raise TrajectoryError(f"{PARTS_FILE}: {fault}; {PARTS_REMEDY}.")
    parts = tuple(
        Part(first_step=entry["first_step"], environment={name: entry[name] for name in entry if name != "first_step"})
        for entry in content["parts"]
    )
    steps = [part.first_step for part in parts]
    if steps != sorted(set(steps)):
        raise TrajectoryError(f"{PARTS_FILE}: its parts are not in the order of their first steps; {PARTS_REMEDY}.")
    return parts
