"""Activated adapters of a split model, and of which processes divide the probe points."""

from pathlib import Path

import pytest
import torch

from hf_dpzo.trainer import checking

from support.activated import activated_model, activated_rows, train_activated
from support.parts import split
from support.processes import ROWS, Here, alone, frozen
from support.runs import fingerprint, released


pytestmark = pytest.mark.slow
WITHOUT = frozenset([5, 12])


def trained_in_parts(here: Here, folder: Path) -> str:
    frozen(here)
    # A split model is always evaluated as a whole. From the invocation on, rows are rounded otherwise.
    here.patch.setattr(checking, "find_shared_work", lambda *_, **__: None)
    make = activated_model if here.size == 1 else lambda: split(activated_model())
    return fingerprint(train_activated(folder, rows=activated_rows(ROWS, without=WITHOUT), make=make))


def trained_by_points(here: Here, folder: Path) -> str:
    frozen(Here(rank=0, size=1, patch=here.patch), seed=here.rank)  # What the others draw is not used.
    settings = {"padded_lengths": None, "parallel": "points"}
    return fingerprint(train_activated(folder, rows=activated_rows(ROWS, without=WITHOUT), **settings))


@pytest.mark.parametrize("job", [trained_in_parts, trained_by_points])
def test_two_processes_train_it_as_one_does(job, pair, tmp_path):
    torch.manual_seed(0)
    one = alone(job, tmp_path / "one")
    assert pair.each(job, tmp_path / "several") == [one] * 2
    assert released(tmp_path / "one") == released(tmp_path / "several")
