"""Runs with pictures, and without."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

from hf_dpzo import plots


@contextmanager
def matplotlib_is_there(there: bool) -> Iterator[None]:
    """Let runs find matplotlib, or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "find_spec", find_spec if there else lambda name: None)
        yield
