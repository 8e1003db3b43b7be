"""Earlier runs on the same rows, by their logs: what they released is composed with what a run plans to release."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dpzo.privacy.ledger import Ledger
from hf_dpzo.privacy.queries import Releases
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.run import LoggedRun


@dataclass(frozen=True, kw_only=True)
class EarlierRuns:
    """Runs that were made on the same rows before.

    Args:
        logs: their logs.
        releases: all that they claim to release, with their unused steps, their trials and runs before them.
        isolations: how rows were isolated in each part of them.
        beginnings: what their logs say of trainings that made what they began with, and that they do not count.
    """

    logs: tuple[Trajectory, ...] = ()
    releases: Releases = ()
    isolations: tuple[Mapping[str, Any], ...] = ()
    beginnings: tuple[Mapping[str, Any], ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """What identifies the runs within a process; see `name_log`."""
        return frozenset(map(name_log, self.logs))

    @property
    def checksums(self) -> tuple[str, ...]:
        """The last checksums of all logs that are counted, also by earlier runs, in hexadecimal."""
        counted = {checksum for log in self.logs for checksum in (*log.header.get("counted", ()), _checksum(log))}
        return tuple(sorted(counted))

    def count(self, log: Trajectory) -> bool:
        """Return whether all that `log` holds is counted: as a copy of a counted log, or in one."""
        return any(_is_same_run(log, other) for other in self.logs) or _checksum(log) in self.checksums


def read_earlier_runs(folders: Iterable[str | Path], *, unit_column: str | None) -> EarlierRuns:
    """Read the logs in `folders`, each of which counts once, however many copies of it are named.

    A copy that went on by itself has released more than the log that it is a copy of, and counts in full.

    Args:
        folders: the folders of the runs, or copies of them.
        unit_column: the column that says whose a row is in the run that goes on from them; `None` if the unit is a row.

    Raises:
        ValueError: there is no log, or it is of a run without noise, or of one that protects another unit.
    """
    ledger = Ledger()
    counted: list[Trajectory] = []
    for folder in folders:
        log = Trajectory.read(folder)
        run = LoggedRun.from_log(log)
        if not run.budget.private:
            raise ValueError(f"earlier_runs={folder}: that run added no noise, and no epsilon covers it; leave it out.")
        if run.unit_column != unit_column:
            raise ValueError(
                f"earlier_runs={folder}: its privacy_unit_column is {run.unit_column}, and epsilons of different units "
                "do not add up; set it as it was."
            )
        if not any(_is_same_run(log, other) for other in counted):
            counted.append(log)
            for query, count in run.budget.claimed_releases:
                ledger.append(query, count)
    beginnings = (log.header.get("began_from") for log in counted)
    return EarlierRuns(
        logs=tuple(counted),
        releases=ledger.releases,
        isolations=tuple(part.environment["isolation"] for log in counted for part in log.parts),
        beginnings=tuple(one for one in beginnings if one is not None),
    )


def name_log(log: Trajectory) -> str:
    """Return what identifies a log and all its copies: the checksum of its header and of its first release."""
    return log.checksum_after(min(1, len(log.records))).hex()


def _checksum(log: Trajectory) -> str:
    return log.checksum_after(len(log.records)).hex()


def _is_same_run(one: Trajectory, other: Trajectory) -> bool:
    """Return whether one of the logs is the beginning of the other. Of logs without a record nobody can tell."""
    steps = min(len(one.records), len(other.records))
    return steps > 0 and one.checksum_after(steps) == other.checksum_after(steps)
