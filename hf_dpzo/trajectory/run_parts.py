"""The parts of one run, as its log uses them: on disk before a part's first release, and found again by their steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dpzo.trajectory.parts import PARTS_FILE, Part, is_covered, write_later_parts


class RunParts:
    """The parts of a run, and the file that holds them.

    Args:
        folder: the run's folder.
        later_parts: the parts that the file there holds.
    """

    def __init__(self, folder: Path, later_parts: tuple[Part, ...]) -> None:
        self._folder = folder
        self._later = later_parts

    def begin(self, step: int, environment: Mapping[str, Any], *, first: Mapping[str, Any]) -> None:
        """Put a part that begins with `step` on disk, if `environment` is not covered by that of the part before.

        No release came from a part that was to begin here, or it would be in the log, or torn: it is forgotten.

        Args:
            step: the step whose release comes next.
            environment: what holds from there on.
            first: what held when the run began.

        Raises:
            OSError: the folder cannot be written to.
        """
        before = tuple(part for part in self._later if part.first_step < step)
        is_new = not is_covered(environment, before[-1].environment if before else first)
        self._later = (*before, Part(first_step=step, environment=environment)) if is_new else before
        if self._later:
            write_later_parts(self._folder, self._later)
        else:
            self.delete()

    def find(self, step: int) -> Part | None:
        """Return the part that begins with `step`; `None` if none does."""
        return next((part for part in self._later if part.first_step == step), None)

    def delete(self) -> None:
        """Delete the file, of this run or of another whose log was deleted."""
        (self._folder / PARTS_FILE).unlink(missing_ok=True)
