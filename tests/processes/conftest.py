"""Processes, launched once for each module that asks for them."""

from collections.abc import Iterator

import pytest

from support.processes import Processes


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    """Two processes."""
    processes = Processes(2)
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def launched(pair) -> Iterator[dict[int, Processes]]:
    """Processes by how many there are: two, three or four."""
    others = {size: Processes(size) for size in (3, 4)}
    yield {2: pair, **others}
    for processes in others.values():
        processes.end()
