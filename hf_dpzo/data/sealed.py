"""Sealed work on private rows: it draws no global randomness, and its errors say nothing about the rows."""

import random
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from hf_dpzo.data.silence import silence


Result = TypeVar("Result")


# Whether this thread works on private rows.
_SEALED = ContextVar("_SEALED", default=False)


class WithheldError(RuntimeError):
    """A user's code failed on private rows. Its message is withheld."""


class GlobalRandomnessError(RuntimeError):
    """A user's code drew from a global random generator."""


class OutOfSyncError(RuntimeError):
    """This process cannot do what the others wait for, and must end. The message says nothing about a row."""


def run_sealed(what: str, work: Callable[[], Result]) -> Result:
    """Return the result of a user's code on private rows. Its prints, warnings and logs are dropped.

    Of an error only the type is shown, because its text may show a row.

    Args:
        what: the name of the code, for messages.
        work: the code.

    Raises:
        WithheldError: the code failed.
        GlobalRandomnessError: the code drew from a global generator.
        OutOfSyncError: other processes would wait for this one.

    >>> run_sealed("data_collator", lambda: {}["a secret"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    hf_dpzo.data.sealed.WithheldError: data_collator: KeyError was raised; what it says is withheld, ...
    """
    failure = None
    token = _SEALED.set(True)
    try:
        with silence():
            return run_without_randomness(what, work)
    except (GlobalRandomnessError, OutOfSyncError, KeyboardInterrupt):
        raise
    except BaseException as error:  # Also SystemExit, which would end the run with a message about a row.
        failure = type(error).__name__
    finally:
        _SEALED.reset(token)
    # Raised outside the handler, where Python would attach the other error to this one.
    raise WithheldError(f"{what}: {failure} was raised; what it says is withheld, for it may show a row.")


def is_sealed() -> bool:
    """Return whether private rows are being evaluated, so that a row that fails must not show.

    >>> is_sealed(), run_sealed("per_example_loss", is_sealed)
    (False, True)
    """
    return _SEALED.get()


def run_without_randomness(what: str, work: Callable[[], Result]) -> Result:
    """Return the result of `work`, or raise `GlobalRandomnessError` if it drew from a global generator.

    A draw would make the result for one row depend on how many rows came before it, and would leave their number in the
    generator's state. So the generators are set back.
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


def _get_generator_states() -> tuple:
    gpus = tuple(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()) if _uses_gpu() else ()
    return torch.get_rng_state().numpy().tobytes(), _get_numpy_state(), random.getstate(), gpus


@dataclass(frozen=True, kw_only=True)
class _NumpyState:
    """The state of NumPy's global generator, in NumPy's own form and in one that can be compared."""

    raw: dict[str, Any] = field(compare=False)
    comparable: tuple


def _get_numpy_state() -> _NumpyState:
    state = np.random.get_state(legacy=False)  # The legacy form would cover only one kind of generator.
    return _NumpyState(raw=state, comparable=_freeze(state))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _freeze(item)) for name, item in value.items())
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _restore_states(states: tuple) -> None:
    torch_state, numpy_state, python_state, gpu_states = states
    torch.set_rng_state(torch.frombuffer(bytearray(torch_state), dtype=torch.uint8))
    np.random.set_state(numpy_state.raw)
    random.setstate(python_state)
    if gpu_states:
        torch.cuda.set_rng_state_all([torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in gpu_states])


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
