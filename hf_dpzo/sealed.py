"""Work on private rows, sealed: it draws no global randomness, and its errors say nothing about the rows."""

import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch


Result = TypeVar("Result")


def sealed(what: str, work: Callable[[], Result]) -> Result:
    """Return what somebody's code makes of private rows.

    Drawing from a global generator would make what happens to one row depend on how many rows came before it, and would
    leave a count of them in the generator's state. The text of an error may show a row; its type is shown instead.

    >>> sealed("data_collator", lambda: {}["a secret"])
    Traceback (most recent call last):
    RuntimeError: data_collator: KeyError was raised; what it says is withheld, for it may show a row: try public rows.
    """
    before, failure = _states(), None
    try:
        result = work()
    except Exception as error:
        failure = type(error).__name__
    # Raised out here: inside, Python would attach the other error to this one.
    if failure is not None:
        raise RuntimeError(
            f"{what}: {failure} was raised; what it says is withheld, for it may show a row: try public rows."
        )
    if _states() != before:
        raise RuntimeError(
            f"{what}: it draws from a global random generator, so that one row depends on the others; make it a "
            "function of the row alone."
        )
    return result


def _states() -> tuple:
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()
