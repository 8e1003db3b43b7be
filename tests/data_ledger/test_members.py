"""Rows are recognized by their content with a secret key, whatever their order, and what is not known errs to more."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.members import Members
from hf_dpzo.data_ledger.overlap import describe_overlap, find_shared_sets
from hf_dpzo.data_ledger.summary import Summary
from hf_dpzo.privacy.accounting import account

from support.ledgers import QUERY, enter, units


KEY = bytes(range(32))
ROWS = [{"text": f"note {i}", "label": i % 2, "patient": f"p{i // 2}"} for i in range(8)]


def members(rows, unit_column=None, key=KEY) -> Members:
    return Members.of(rows, unit_column=unit_column, key=key)


def test_the_order_of_rows_and_their_storage_have_no_say():
    table = Dataset.from_list(ROWS)
    expected = members(table).identity(KEY)
    for same in (table.shuffle(seed=1), ROWS[::-1], table.with_format("torch"), table.select(range(8))):
        assert members(same).identity(KEY) == expected
    changed = [{**ROWS[0], "label": 1}, *ROWS[1:]]
    for other in (ROWS[1:], [*ROWS, ROWS[0]], changed):
        assert members(other).identity(KEY) != expected


def test_nobody_without_the_key_can_recompute_a_digest():
    assert not np.isin(members(ROWS).digests, members(ROWS, key=bytes(32)).digests).any()
    assert members(ROWS).form != members(ROWS, key=bytes(32)).form


def test_a_user_is_the_same_whatever_their_rows_are():
    one, other = members(ROWS, "patient"), members([{**row, "text": "edited"} for row in ROWS[:2]], "patient")
    assert (len(one.digests), len(other.digests)) == (4, 1)
    assert describe_overlap([one], other) == "partly the same"
    numbers = [{"patient": 3}], [{"patient": torch.tensor(3)}], [{"patient": np.int64(3)}]
    assert len({members(rows, "patient").identity(KEY) for rows in numbers}) == 1


class Failing(list):
    def __getitem__(self, number):
        if number == 3:
            raise RuntimeError("note 3")
        return super().__getitem__(number)


def test_a_row_that_fails_has_no_content_and_shows_nothing(capsys):
    assert len(members(Failing(ROWS)).digests) == 8
    assert capsys.readouterr() == ("", "")


def unpicklable():
    return [{"text": lambda: None} for _ in range(4)]


def transformed():
    return Dataset.from_list(ROWS).with_transform(lambda rows: {"x": torch.rand(len(rows["text"]))})


@pytest.mark.parametrize("build", [unpicklable, transformed])
def test_rows_that_cannot_be_compared_may_be_any_rows(build):
    unknown = members(build())
    assert unknown.digests is None
    assert describe_overlap([members(ROWS)], unknown) == "not comparable"
    assert find_shared_sets({1: members(ROWS), 2: unknown, 3: units(5)}) == [frozenset({1, 2, 3})]


def test_a_missing_column_of_users_leaves_them_unknown():
    assert members(ROWS, "nobody").digests is None


def test_the_most_affected_unit_is_composed_exactly(tmp_path):
    ledger = DataLedger(tmp_path / "data.ledger", create=True)
    enter(ledger, "a", units(1, 2, 3), steps=10)
    enter(ledger, "b", units(3, 4), steps=20)
    enter(ledger, "c", units(4, 5), steps=40)
    enter(ledger, "d", units(9), steps=50)
    (summary,) = Summary.of(ledger).units
    assert summary.most_affected.epsilon == account(((QUERY, 60),), delta=1e-5).epsilon
    assert summary.total.epsilon == account(((QUERY, 120),), delta=1e-5).epsilon
    assert [line.rows for line in summary.lines] == ["the first", "partly the same", "partly the same", "others"]


def test_units_of_different_forms_are_taken_to_be_the_same():
    found = find_shared_sets({1: units(1), 2: units(2), 3: units(7, form=b"tokens")})
    assert sorted(map(sorted, found)) == [[1, 3], [2, 3]]


def test_too_many_patterns_are_composed_as_one():
    data_sets = {number: units(number) for number in range(100)}
    assert find_shared_sets(data_sets) == [frozenset(data_sets)]
