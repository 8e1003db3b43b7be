"""Sweeps: what of a product is run by default, and what only where there is time, by `-m slow`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Values of a parameter that only a slow run takes."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def sweep(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """The full product of some parameters' values, of which the default run takes as few as show each value once.

    >>> mark = sweep(size=[1, 2, 3], lora=[True, False])
    >>> [case.values for case in mark.args[1] if not case.marks]
    [(1, True), (2, False), (3, True)]
    >>> len(mark.args[1])
    6
    """
    values = [list(axis) for axis in axes.values()]
    shown = {tuple(index % len(axis) for axis in values) for index in range(max(map(len, values)))}
    cases = [
        pytest.param(
            *(axis[i] for axis, i in zip(values, at, strict=True)), marks=[] if at in shown else pytest.mark.slow
        )
        for at in itertools.product(*(range(len(axis)) for axis in values))
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


def each_with_each(names: Iterable[str], kinds: Iterable[str]) -> pytest.MarkDecorator:
    """A sweep of `name`, `kind` and `lora` in which any two of their values meet.

    Directions know neither methods nor models, so that nothing hangs on all three. The default run takes the cases that
    show each name and each kind once.
    """
    names, kinds = list(names), list(kinds)
    cases = [
        pytest.param(
            name,
            kind,
            (i + j) % 2 == 0,
            id=f"{name}-{kind}-{'full' if (i + j) % 2 else 'lora'}",
            marks=[] if i % len(kinds) == j else pytest.mark.slow,
        )
        for i, name in enumerate(names)
        for j, kind in enumerate(kinds)
    ]
    return pytest.mark.parametrize(("name", "kind", "lora"), cases)
