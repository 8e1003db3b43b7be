"""Progress bars of rows that show no number of them.

Rows of which nothing is learned are left out. Beside the number of those that are trained, which is public, the number
of rows that were read would tell how many there are of these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import datasets
from datasets.utils import tqdm

from hf_dpzo.trainer.progress import SHARES


# Shares of fewer rows would tell how many these are.
_LEAST_ROWS = 1000


# The bar that is shown, which what is done for each row moves.
_BAR: ContextVar[Any] = ContextVar("_BAR", default=None)


@contextmanager
def uncounted_bar(description: str, total: int | None = None) -> Iterator[None]:
    """Show a bar that `advance` moves inside the context, instead of those of `datasets`, which count rows.

    Args:
        description: what is done, in words.
        total: the number of rows, of which the bar shows shares alone; `None` if it is not known.
    """
    are_hidden = datasets.are_progress_bars_disabled()
    total = None if total is None or total < _LEAST_ROWS else total
    shown_as = "{desc}: {elapsed}" if total is None else SHARES
    # It is shown in terminals alone, as tqdm has it for None.
    with tqdm(desc=description, total=total, bar_format=shown_as, disable=None) as bar:
        token = _BAR.set(bar)
        datasets.disable_progress_bars()
        try:
            yield
            if total is not None:
                bar.update(total - bar.n)  # Rows that were found in the cache did not move it.
        finally:
            _BAR.reset(token)
            if not are_hidden:
                datasets.enable_progress_bars()


def advance() -> None:
    """Move the bar that is shown, if there is one, by a row."""
    bar = _BAR.get()
    if bar is not None:
        bar.update()
