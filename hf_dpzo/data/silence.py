"""Silence while private rows are evaluated: nothing is shown, and nothing is remembered as shown."""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import torch


@contextmanager
def silence() -> Iterator[None]:
    """Drop what is printed, warned or logged inside the context, by Python or below it.

    Messages that are shown only once are not used up: whether they come later would tell what was evaluated here.
    """
    factory = logging.getLogRecordFactory()
    warns_always = torch.is_warn_always_enabled()
    # `logging.disable` would clear a cache in each of the process' loggers, of which there are hundreds, every time.
    logging.setLogRecordFactory(_build_empty_record)
    torch.set_warn_always(True)  # Otherwise torch would remember which of its warnings it has shown.
    try:
        with open(os.devnull, "w") as nowhere, ExitStack() as stack:
            stack.enter_context(_redirected_descriptors(nowhere.fileno()))
            stack.enter_context(_forgetful_loggers())
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_warn_always(warns_always)
        logging.setLogRecordFactory(factory)


def _build_empty_record(*_: object, **__: object) -> logging.LogRecord:
    """Return a log record without content, at a level below that of every handler."""
    return logging.LogRecord("", logging.NOTSET - 1, "", 0, "", (), None)


@contextmanager
def _redirected_descriptors(target: int) -> Iterator[None]:
    """Send what compiled code, and streams that were opened before, write to descriptors 1 and 2 to `target`."""
    _flush()
    kept = {}
    for descriptor in (1, 2):
        with suppress(OSError):  # A process may have closed it.
            kept[descriptor] = os.dup(descriptor)
            os.dup2(target, descriptor)
    try:
        yield
    finally:
        _flush()
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(Exception):  # A notebook's stream, or one that is closed or missing.
            stream.flush()
    if os.name == "posix":
        ctypes.pythonapi.fflush(None)  # The buffers of all streams of C.


@contextmanager
def _forgetful_loggers() -> Iterator[None]:
    """Exchange the methods of loggers that remember what they have shown, such as `warning_once` of transformers."""
    owners = (logging.Logger, *logging.LoggerAdapter.__subclasses__())
    methods = [(owner, name, method) for owner in owners for name, method in vars(owner).items() if _remembers(method)]
    for owner, name, _ in methods:
        setattr(owner, name, _say_nothing)
    try:
        yield
    finally:
        for owner, name, method in methods:
            setattr(owner, name, method)


def _remembers(method: Any) -> bool:
    return callable(getattr(method, "cache_clear", None))  # What functools.lru_cache made.


def _say_nothing(*_: object, **__: object) -> None:
    """Stand in for a method that logs."""
