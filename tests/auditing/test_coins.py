"""Coins are fair, secret, kept for this user alone, and bound to the run by a commitment."""

import os
import stat

import numpy as np
import pytest

from hf_dpzo.auditing.coins import COINS_FILE, Coins
from hf_dpzo.card.files import PUBLIC_SUFFIXES


def test_coins_are_fair_and_independent():
    values = np.array(Coins.flip(40_000).values, dtype=float)
    assert abs(values.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03
    assert Coins.flip(64).values != Coins.flip(64).values


def test_coins_come_back_from_disk(tmp_path):
    coins = Coins.flip(20, recipe=("--seed=1",))
    coins.save(tmp_path / "new")
    assert Coins.load(tmp_path / "new") == coins
    assert [path.name for path in (tmp_path / "new").iterdir()] == [COINS_FILE]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_only_this_user_may_read_coins(tmp_path):
    Coins.flip(4).save(tmp_path)
    assert stat.S_IMODE((tmp_path / COINS_FILE).stat().st_mode) == 0o600


def test_coins_are_not_written_through_a_link(tmp_path):
    other = tmp_path / "other"
    other.write_text("untouched")
    (tmp_path / COINS_FILE).symlink_to(other)
    Coins.flip(4).save(tmp_path)
    assert other.read_text() == "untouched"
    assert not (tmp_path / COINS_FILE).is_symlink()


def test_no_upload_takes_files_of_their_suffix():
    assert os.path.splitext(COINS_FILE)[1] not in PUBLIC_SUFFIXES


def test_the_commitment_fits_no_other_coins_and_no_other_nonce():
    coins = Coins(values=(True, False), nonce="ab")
    assert coins.commitment == Coins(values=(True, False), nonce="ab", recipe=("--x",)).commitment
    others = [Coins(values=(False, True), nonce="ab"), Coins(values=(True, False), nonce="cd")]
    assert coins.commitment not in [other.commitment for other in others]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"coins": [0, 2], "nonce": "", "recipe": []}', '{"coins": 3}', "\x00", "[" * 10_000]
)
def test_damaged_coins_are_refused(tmp_path, content):
    (tmp_path / COINS_FILE).write_text(content)
    with pytest.raises(ValueError, match="does not hold the coins of a run"):
        Coins.load(tmp_path)


def test_missing_coins_are_named(tmp_path):
    with pytest.raises(ValueError, match="the coins of the canaries are not there"):
        Coins.load(tmp_path)
