"""Keeps the Rényi accountant from configuring the logging of the whole process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


# It warns of each order that it leaves out. The remaining orders still give an upper bound.
logging.getLogger("absl").setLevel(logging.ERROR)


@contextmanager
def kept_logging() -> Iterator[None]:
    """Remove what is added to the root logger inside the context.

    As dp-accounting warns, by absl, a process without handlers gets one, though the warning itself is dropped. From
    then on every library's messages would look otherwise. Remove this when absl asks for the level first.
    """
    before = [*logging.root.handlers]
    try:
        yield
    finally:
        for handler in [*logging.root.handlers]:
            if handler not in before:
                logging.root.removeHandler(handler)
