"""Frozen work of several processes: each keeps the rows that it meets, and all release what one alone does."""

from pathlib import Path

import pytest
import torch

from support.activated import activated_model, activated_rows, train_activated
from support.models import causal_lm
from support.processes import ROWS, Here, alone, frozen
from support.runs import fingerprint, released


WITHOUT = frozenset([5, 12])
SETTINGS = {"max_steps": 3, "method": "aggzo", "num_directions": 2}


def build() -> torch.nn.Module:
    return activated_model(causal_lm(num_hidden_layers=2), layers_to_transform=[1])


def trained_on_shares(here: Here, folder: Path) -> str:
    frozen(here)
    settings = {"frozen_cache": "memory", **SETTINGS}
    return fingerprint(train_activated(folder, rows=activated_rows(ROWS, without=WITHOUT), make=build, **settings))


def trained_by_points(here: Here, folder: Path) -> str:
    frozen(Here(rank=0, size=1, patch=here.patch), seed=here.rank)  # What the others draw is not used.
    settings = {"padded_lengths": None, "parallel": "points", "frozen_cache": "disk", **SETTINGS}
    return fingerprint(train_activated(folder, rows=activated_rows(ROWS, without=WITHOUT), make=build, **settings))


@pytest.mark.parametrize("job", [trained_on_shares, trained_by_points])
def test_two_processes_that_keep_rows_train_as_one_does(job, pair, tmp_path):
    torch.manual_seed(0)
    one = alone(job, tmp_path / "one")
    assert pair.each(job, tmp_path / "several") == [one] * 2
    assert released(tmp_path / "one") == released(tmp_path / "several")
