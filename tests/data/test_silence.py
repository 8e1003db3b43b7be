"""While private rows are evaluated nothing is shown, however it is written, and nothing is remembered as shown."""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate import PartialState
from accelerate.logging import get_logger as get_accelerate_logger
from transformers.utils.logging import get_logger

from hf_dpzo.data.silence import silence


def write_by_a_stream_of_c():
    text = b"a secret"
    stream = ctypes.CDLL(None).fdopen
    stream.restype = ctypes.c_void_p
    ctypes.CDLL(None).fputs(text, ctypes.c_void_p(stream(1, b"w")))  # Stays in the stream's buffer.


WAYS = {
    "descriptor 1": lambda: os.write(1, b"a secret"),
    "descriptor 2": lambda: os.write(2, b"a secret"),
    "the first stream": lambda: sys.__stdout__.write("a secret"),
    "the first stream of errors": lambda: print("a secret", file=sys.__stderr__),
    "another process": lambda: os.system("echo a secret"),
    "C": write_by_a_stream_of_c,
}


@pytest.mark.parametrize("name", WAYS)
def test_what_is_written_below_python_is_dropped(name, capfd):
    with silence():
        WAYS[name]()
    os.write(1, b"public")
    assert capfd.readouterr() == ("public", "")


def test_what_was_written_before_is_shown(capfd):
    kept = sys.__stdout__
    kept.write("before")  # In the stream's buffer.
    with silence():
        kept.write("a secret")
    kept.flush()
    assert capfd.readouterr().out == "before"


def test_a_process_without_descriptors_is_silent_too(capfd):
    copy = os.dup(2)
    os.close(2)
    try:
        with silence():
            pass
        with pytest.raises(OSError):
            os.fstat(2)
    finally:
        os.dup2(copy, 2)
        os.close(copy)


class Kept(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def shown_by(logger: logging.Logger, show: Callable[[], object]) -> list[str]:
    """What is shown after it was to be shown within a seal, where it is dropped."""
    handler = Kept()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with silence():
        show()
    assert not handler.messages
    show()
    show()
    logger.removeHandler(handler)
    return handler.messages


@pytest.mark.parametrize("level", ["warning_once", "info_once"])
def test_messages_that_are_shown_once_are_not_used_up(level):
    logger = get_logger(f"transformers.{level}")
    assert shown_by(logger, lambda: getattr(logger, level)("said once")) == ["said once"]


def test_messages_that_accelerate_shows_once_are_not_used_up():
    PartialState()
    adapter = get_accelerate_logger("some.module")
    assert len(shown_by(adapter.logger, lambda: adapter.warning_once("said once"))) == 1


def test_warnings_that_are_shown_once_are_not_used_up():
    def warn():
        warnings.warn("said once", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("once")
        with silence():
            warn()
        warn()
        warn()
    assert len(shown) == 1


def test_warnings_that_torch_shows_once_are_not_used_up():
    assert not torch.is_warn_always_enabled()
    with silence():
        transpose_three_dimensions()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        transpose_three_dimensions()
        transpose_three_dimensions()
    assert len(shown) == 1
    assert not torch.is_warn_always_enabled()


def transpose_three_dimensions() -> torch.Tensor:
    return torch.ones(2, 2, 2).T
