"""Work on private rows, sealed: it draws no global randomness, and its errors say nothing about the rows."""

import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch


Result = TypeVar("Result")


class WithheldError(RuntimeError):
    """Somebody's code failed on private rows. What it said is withheld."""


class DrawnError(RuntimeError):
    """Somebody's code drew from a global random generator."""


def sealed(what: str, work: Callable[[], Result]) -> Result:
    """Return what somebody's code makes of private rows. Of an error only the type is shown: its text may show one.

    Raises:
        WithheldError: the code failed.
        RuntimeError: it drew from a global generator.

    >>> sealed("data_collator", lambda: {}["a secret"])
    Traceback (most recent call last):
    hf_dpzo.sealed.WithheldError: data_collator: KeyError was raised; what it says is withheld, for it may show a row.
    """
    failure = None
    try:
        return drawing_nothing(what, work)
    except DrawnError:
        raise
    except Exception as error:
        failure = type(error).__name__
    # Raised out here: inside, Python would attach the other error to this one.
    raise WithheldError(f"{what}: {failure} was raised; what it says is withheld, for it may show a row.")


def drawing_nothing(what: str, work: Callable[[], Result]) -> Result:
    """Return what `work` makes, or raise `DrawnError` if it drew from a global generator.

    That would make what happens to one row depend on how many rows came before it, and would leave a count of them in
    the generator's state.
    """
    before = _states()
    result = work()
    if _states() != before:
        raise DrawnError(
            f"{what}: it draws from a global random generator, so that one row depends on the others; make it a "
            "function of the row alone."
        )
    return result


def _states() -> tuple:
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()
