"""Which runs a single unit of privacy can have been in, by the digests of the units of each run.

This is for the holder of the ledger alone, because it depends on the rows. What is published, and what a budget is
compared with, takes all units to be in all runs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from hf_dpzo.data_ledger.members import Members


# The most sets of runs that are composed; beyond, all runs are taken to share a unit.
MAX_SETS = 64


def find_shared_sets(data_sets: Mapping[int, Members]) -> list[frozenset[int]]:
    """Return the largest sets of data sets that a unit can be in, each by the numbers of its data sets.

    Units of one form are compared. Those of two forms may be the same, and one that cannot be told apart may be in all.

    >>> def rows(*digests):
    ...     return Members(form=b"", digests=np.array(digests, dtype="<u8"))
    >>> sorted(sorted(one) for one in find_shared_sets({1: rows(5, 6), 2: rows(6, 7), 3: rows(8)}))
    [[1, 2], [3]]
    """
    forms: dict[bytes, dict[int, np.ndarray]] = {}
    everywhere = frozenset(number for number, members in data_sets.items() if members.digests is None)
    for number, members in data_sets.items():
        if members.digests is not None:
            forms.setdefault(members.form, {})[number] = np.unique(members.digests)
    patterns = [_find_patterns(of_form) for of_form in forms.values()]
    if math.prod(map(len, patterns)) > MAX_SETS:
        return [frozenset(data_sets)]
    return [everywhere.union(*chosen) for chosen in itertools.product(*patterns)]


def _find_patterns(data_sets: Mapping[int, np.ndarray]) -> list[frozenset[int]]:
    """Return the largest sets of `data_sets` that hold a digest in common."""
    numbers = [*data_sets]
    digests = np.unique(np.concatenate([*data_sets.values()]))
    held = np.stack([np.isin(digests, data_sets[number], assume_unique=True) for number in numbers], axis=1)
    rows = np.unique(held, axis=0) if len(held) else held
    patterns = [frozenset(itertools.compress(numbers, row)) for row in rows.tolist()]
    return [one for one in patterns if not any(one < other for other in patterns)]


def describe_overlap(earlier: Sequence[Members], members: Members) -> str:
    """Say how the units of a run lie to those of the runs before it, without a count.

    >>> one, other = (Members(form=b"", digests=np.array(units, dtype="<u8")) for units in ([5, 6], [6, 7]))
    >>> describe_overlap([], one), describe_overlap([one], one), describe_overlap([one], other)
    ('the first', 'the same', 'partly the same')
    """
    if not earlier:
        return "the first"
    if any(_is_same(one, members) for one in earlier):
        return "the same"
    compared = [one for one in earlier if one.form == members.form and one.digests is not None]
    if members.digests is None or len(compared) < len(earlier):
        return "not comparable"
    if any(np.isin(members.digests, one.digests).any() for one in compared):
        return "partly the same"
    return "others"


def _is_same(one: Members, other: Members) -> bool:
    if one.digests is None or other.digests is None:
        return False
    return one.form == other.form and np.array_equal(one.digests, other.digests)
