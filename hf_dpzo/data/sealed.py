"""Work on private rows, sealed: it draws no global randomness, and its errors say nothing about the rows."""

import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch


Result = TypeVar("Result")


class WithheldError(RuntimeError):
    """Somebody's code failed on private rows. What it said is withheld."""


class GlobalRandomnessError(RuntimeError):
    """Somebody's code drew from a global random generator."""


class OutOfSyncError(RuntimeError):
    """This process can not do what the others wait for, and has to end. It says nothing of a row."""


def run_sealed(what: str, work: Callable[[], Result]) -> Result:
    """Return what somebody's code makes of private rows. What it prints, warns of and logs is dropped.

    Of an error only the type is shown: its text may show a row.

    Raises:
        WithheldError: the code failed.
        GlobalRandomnessError: it drew from a global generator.
        OutOfSyncError: other processes would wait for this one.

    >>> run_sealed("data_collator", lambda: {}["a secret"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    hf_dpzo.data.sealed.WithheldError: data_collator: KeyError was raised; what it says is withheld, ...
    """
    failure = None
    try:
        with _silence():
            return run_without_randomness(what, work)
    except (GlobalRandomnessError, OutOfSyncError, KeyboardInterrupt):
        raise
    except BaseException as error:  # Also SystemExit, which would end the run with what it says of a row.
        failure = type(error).__name__
    # Raised out here: inside, Python would attach the other error to this one.
    raise WithheldError(f"{what}: {failure} was raised; what it says is withheld, for it may show a row.")


def run_without_randomness(what: str, work: Callable[[], Result]) -> Result:
    """Return what `work` makes, or raise `GlobalRandomnessError` if it drew from a global generator, which is put back.

    That would make what happens to one row depend on how many rows came before it, and would leave a count of them in
    the generator's state.
    """
    before = _get_generator_states()
    try:
        result = work()
    finally:
        drawn = _get_generator_states() != before
        if drawn:
            _restore_states(before)
    if drawn:
        raise GlobalRandomnessError(
            f"{what}: it draws from a global random generator, so that one row depends on the others; make it a "
            "function of the row alone."
        )
    return result


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is printed, warned of or logged inside."""
    factory = logging.getLogRecordFactory()
    # `logging.disable` would empty a cache in each of the process's loggers, of which there are hundreds, every time.
    logging.setLogRecordFactory(_build_empty_record)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings(), redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            with redirect_stderr(nowhere):
                yield
    finally:
        logging.setLogRecordFactory(factory)


def _build_empty_record(*_: object, **__: object) -> logging.LogRecord:
    """A record without content, on a level below that of every handler."""
    return logging.LogRecord("", logging.NOTSET - 1, "", 0, "", (), None)


def _get_generator_states() -> tuple:
    gpus = tuple(one.numpy().tobytes() for one in torch.cuda.get_rng_state_all()) if _uses_gpu() else ()
    return torch.get_rng_state().numpy().tobytes(), _get_numpy_state(), random.getstate(), gpus


@dataclass(frozen=True, kw_only=True)
class _NumpyState:
    """The state of NumPy's global generator: as NumPy says it, and so that it can be compared."""

    raw: dict[str, Any] = field(compare=False)
    comparable: tuple


def _get_numpy_state() -> _NumpyState:
    said = np.random.get_state(legacy=False)  # Of any kind of generator, where the other form knows one.
    return _NumpyState(raw=said, comparable=_freeze(said))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _freeze(one)) for name, one in value.items())
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _restore_states(states: tuple) -> None:
    own, numpys, python, gpus = states
    torch.set_rng_state(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    np.random.set_state(numpys.raw)
    random.setstate(python)
    if gpus:
        torch.cuda.set_rng_state_all([torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in gpus])


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
