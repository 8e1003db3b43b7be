"""Earlier runs on the same rows, by their logs: what they released is composed with what a run plans to release."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hf_dpzo.privacy.ledger import Ledger
from hf_dpzo.privacy.queries import Releases
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.run import LoggedRun


@dataclass(frozen=True, kw_only=True)
class EarlierRuns:
    """Runs that were made on the same rows before.

    Args:
        names: what identifies their logs, wherever copies of them are.
        releases: all that they claim to release, with their unused steps, their trials and runs before them.
    """

    names: frozenset[str] = frozenset()
    releases: Releases = ()


def read_earlier_runs(folders: Iterable[str | Path], *, unit_column: str | None) -> EarlierRuns:
    """Read the logs in `folders`, each of which counts once, however many copies of it are named.

    Args:
        folders: the folders of the runs, or copies of them.
        unit_column: the column that says whose a row is in the run that goes on from them; `None` if the unit is a row.

    Raises:
        ValueError: there is no log, or it is of a run without noise, or of one that protects another unit.
    """
    ledger = Ledger()
    names: set[str] = set()
    for folder in folders:
        log = Trajectory.read(folder)
        run = LoggedRun.from_log(log)
        if not run.budget.private:
            raise ValueError(f"earlier_runs={folder}: that run added no noise, and no epsilon covers it; leave it out.")
        if (run.unit_column is None) != (unit_column is None):
            raise ValueError(
                f"earlier_runs={folder}: its unit of privacy is a {run.unit_name}, and epsilons of different units do "
                "not add up; set privacy_unit_column as it was."
            )
        if name_log(log) not in names:
            names.add(name_log(log))
            for query, count in run.budget.claimed_releases:
                ledger.append(query, count)
    return EarlierRuns(names=frozenset(names), releases=ledger.releases)


def name_log(log: Trajectory) -> str:
    """Return what identifies a log and all its copies: the checksum of its header and of its first release."""
    return log.checksum_after(min(1, len(log.records))).hex()
