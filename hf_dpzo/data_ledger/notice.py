"""What is said of a ledger before a run is entered: where it is, and what was spent, so that no new one goes unseen."""

import os
import shlex
from pathlib import Path

from transformers.utils import logging

from hf_dpzo.data_ledger.data_ledger import DataLedger, compose
from hf_dpzo.privacy.rounding import round_up


logger = logging.get_logger(__name__)


def announce_ledger(path: Path, *, unit_column: str | None = None) -> None:
    """Warn of the line of `describe_ledger`, once for each state of a ledger that this process sees."""
    logger.warning_once(describe_ledger(path, unit_column=unit_column))


def describe_ledger(path: Path, *, unit_column: str | None = None) -> str:
    """Return a line with the place of the ledger at `path`, its runs so far, and its budget. Nothing is written.

    Args:
        path: the path of the ledger, which need not be there yet.
        unit_column: the column of the units of privacy of the run that is about to be entered; `None` for rows.

    Raises:
        DataLedgerError: it is damaged or of another program, or lies where it cannot be kept.

    >>> describe_ledger(Path("/nowhere.ledger"))
    'privacy_ledger=/nowhere.ledger: new, without a budget; hf-dpzo ledger /nowhere.ledger --budget sets one'
    """
    path = Path(os.path.abspath(path.expanduser()))  # Without "..", and unlike `resolve` without following a link.
    told = f"privacy_ledger={path}"
    remedy = f"hf-dpzo ledger {shlex.quote(str(path))} --budget sets one"
    if not path.exists():
        return f"{told}: new, without a budget; {remedy}"
    entries = DataLedger(path).read()
    budget, counted = entries.budget, entries.counted
    total = compose([run.plan for run in counted], budget, unit_column=unit_column)
    runs = f"{len(counted)} {'run' if len(counted) == 1 else 'runs'}"
    spent = f"epsilon {round_up(total.epsilon):g}" if total.private else "no epsilon holds for them"
    if budget is None:
        return f"{told}: {runs}, {spent}, without a budget; {remedy}"
    return f"{told}: {runs}, {spent} of {budget.epsilon:g} at delta {budget.delta:g}"
