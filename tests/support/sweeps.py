"""Sweeps that are no full products."""

from collections.abc import Iterable

import pytest


def each_with_each(names: Iterable[str], kinds: Iterable[str]) -> pytest.MarkDecorator:
    """A sweep of `name`, `kind` and `lora` in which any two of their values meet.

    Directions know neither methods nor models, so that nothing hangs on all three.
    """
    cases = [(name, kind, (i + j) % 2 == 0) for i, name in enumerate(names) for j, kind in enumerate(kinds)]
    ids = [f"{name}-{kind}-{'lora' if lora else 'full'}" for name, kind, lora in cases]
    return pytest.mark.parametrize(("name", "kind", "lora"), cases, ids=ids)
