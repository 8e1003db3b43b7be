"""The units of privacy: single rows, or all the rows of one user."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import datasets
import numpy as np
import torch

from hf_dpzo.data.sealed import WithheldError, run_sealed
from hf_dpzo.privacy.noise import choose_subset


# A power of two, so that multiplying by it is exact, that leaves room for a sum of 2**64 values.
_HEADROOM = 2.0**-64


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of privacy of a data set: which rows are protected together.

    Args:
        num_rows: the number of rows in the data set. SENSITIVE if each row is not a unit of its own.
        members: the row numbers of each unit; `None` if each row is a unit of its own.
        max_rows_per_unit: the largest number of a unit's rows that a batch may hold.

    >>> units = Units.from_users(["ann", "bob", "ann"], max_rows=2)
    >>> len(units), units.draw_rows(0), units.draw_rows(1)
    (2, [0, 2], [1])
    """

    num_rows: int
    members: Sequence[np.ndarray] | None = None
    max_rows_per_unit: int = 1

    def __len__(self) -> int:
        return self.num_rows if self.members is None else len(self.members)

    @property
    def public_facts(self) -> dict[str, int | None]:
        """The numbers that may be published: that of the units, and that of the rows only where rows are the units.

        The number of rows of all users together tells how many rows one user has, to whoever knows the others.
        """
        return {"units": len(self), "rows": self.num_rows if self.members is None else None}

    @classmethod
    def from_users(cls, users: Iterable[Any], *, max_rows: int) -> Self:
        """Group rows by user. All rows without a user count as the rows of a single user.

        Args:
            users: the user of each row, a string or a number.
            max_rows: the largest number of a user's rows that a batch may hold.
        """
        members: dict[Any, list[int]] = {}
        for row, user in enumerate(users):
            members.setdefault(_get_user_key(user), []).append(row)
        count = sum(len(rows) for rows in members.values())
        return cls(num_rows=count, members=[np.array(rows) for rows in members.values()], max_rows_per_unit=max_rows)

    @classmethod
    def from_column(cls, dataset: Any, column: str, *, max_rows: int) -> Self:
        """Group the rows of a data set by a column that names their users.

        Args:
            dataset: the data set.
            column: the column's name.
            max_rows: the largest number of a user's rows that a batch may hold.

        Raises:
            ValueError: not all rows have the column.
        """
        try:
            users = read_users(dataset, column)
        except WithheldError:
            raise ValueError(
                f"privacy_unit_column={column}: not all rows of train_dataset have it; name another column."
            ) from None
        return cls.from_users(users, max_rows=max_rows)

    def has_same_members(self, other: Self) -> bool:
        """Return whether the same rows, by their numbers, belong together in `other`."""
        own, others = self.members, other.members
        sizes = [(u.num_rows, len(u), u.max_rows_per_unit, u.members is None) for u in (self, other)]
        return sizes[0] == sizes[1] and (own is None or all(map(np.array_equal, own, others)))

    def with_single_rows(self, count: int) -> Self:
        """Return these units, and `count` more, each of one row. Their rows come after all others.

        >>> units = Units.from_users(["ann", "bob", "ann"], max_rows=2).with_single_rows(1)
        >>> len(units), units.draw_rows(2)
        (3, [3])
        """
        single = [np.array([row]) for row in range(self.num_rows, self.num_rows + count)]
        members = None if self.members is None else [*self.members, *single]
        return replace(self, num_rows=self.num_rows + count, members=members)

    def draw_rows(self, unit: int) -> list[int]:
        """Return the rows that `unit` brings to a batch: all of them, or a random choice of `max_rows_per_unit`."""
        if self.members is None:
            return [unit]
        rows = self.members[unit]
        return (
            rows.tolist()
            if len(rows) <= self.max_rows_per_unit
            else rows[choose_subset(len(rows), self.max_rows_per_unit)].tolist()
        )

    def draw_rows_of(self, units: np.ndarray) -> np.ndarray:
        """Return what `draw_rows` gives for each of `units`, int64 `[2, rows]`: the place of its unit, and the row.

        >>> Units.from_users(["ann", "bob", "ann"], max_rows=2).draw_rows_of(np.array([1, 0])).tolist()
        [[0, 1, 1], [1, 0, 2]]
        """
        if self.members is None:
            return np.stack([np.arange(len(units)), units])
        rows = [self.draw_rows(unit) for unit in units.tolist()]
        places = np.repeat(np.arange(len(units)), np.array([len(own) for own in rows], dtype=np.int64))
        return np.stack([places, np.array([row for own in rows for row in own], dtype=np.int64)])

    def list_rows_of(self, units: Sequence[int]) -> np.ndarray:
        """Return the numbers of all rows of `units`, int64 `[rows]`."""
        if self.members is None:
            return np.asarray(units, dtype=np.int64)
        return np.concatenate([np.empty(0, dtype=np.int64), *(self.members[unit] for unit in units)])


def average_by_unit(coefficients: torch.Tensor, units: Sequence[int], num_units: int) -> torch.Tensor:
    """Return each unit's mean over its own rows, float64 `[num_units, K]` on the CPU. SENSITIVE.

    A value that is not finite counts as zero, so that a bad row spoils only itself. A unit without rows gets zeros.

    Guarantee: a mean is a function of its own unit's rows alone, to the last bit. Rows of other units decide in which
    order rows are evaluated, so a sum that is rounded after each row would depend on them. Here the sum is exact, and
    rounded once (Shewchuk 1997).

    Args:
        coefficients: the coefficients of each row, float64 `[rows, K]`. SENSITIVE.
        units: the unit of each row, from 0.
        num_units: the number of units that were drawn.

    >>> average_by_unit(torch.tensor([[1.0], [3.0], [float("nan")]], dtype=torch.float64), [1, 1, 0], 3).tolist()
    [[0.0], [2.0], [0.0]]
    """
    rows = coefficients.detach().cpu().double().numpy()
    rows = np.where(np.isfinite(rows), rows, 0.0)
    index = np.asarray(units, dtype=np.int64)
    means = np.zeros((num_units, rows.shape[1]))
    counts = np.bincount(index, minlength=num_units)
    single = counts[index] == 1
    means[index[single]] = rows[single]
    for unit in np.flatnonzero(counts > 1):
        means[unit] = _average_exactly(rows[index == unit])
    return torch.from_numpy(means)


def _average_exactly(rows: np.ndarray) -> list[float]:
    """Return the mean of each column, whose sum is rounded once, whatever the order of the rows."""
    # Scaled, because `fsum` fails where a partial sum overflows, which depends on the order.
    columns = (rows * _HEADROOM).T.tolist()
    return [math.fsum(column) / len(rows) / _HEADROOM for column in columns]


def read_users(dataset: Any, column: str) -> list[str | int | float | bytes | None]:
    """Return the user of each row, `None` for rows without one; raise `WithheldError` unless all rows have `column`.

    >>> read_users([{"user": "ann"}, {"user": torch.tensor(3)}], "user")
    ['ann', 3]
    """
    read = run_sealed("train_dataset", lambda: [row[column] for row in _select_column(dataset, column)])
    return [_get_user_key(user) for user in read]


def _select_column(dataset: Any, column: str) -> Iterable[Any]:
    """Return `dataset` without its other columns, if it can leave them unread."""
    return dataset.with_format(None).select_columns([column]) if isinstance(dataset, datasets.Dataset) else dataset


def _get_user_key(user: Any) -> str | int | float | bytes | None:
    """Return the value that identifies a user; `None` for a value that cannot, such as a list or NaN.

    Tensors that hold the same number are different objects, and would otherwise each count as a user.
    """
    if isinstance(user, torch.Tensor | np.ndarray | np.generic):
        array = np.asarray(user)
        user = array.item() if array.size == 1 else None
    return user if isinstance(user, str | int | float | bytes) and user == user else None
