"""How the values of a table become text and classes: by rules for one value, so that no other row can change it."""

import datetime
import decimal
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


# Whole numbers up to this are exact as floats.
_EXACT = 2**53


_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def is_missing(value: Any) -> bool:
    """Return whether a cell holds no value: `None`, or a number that is none.

    >>> is_missing(None), is_missing(float("nan")), is_missing("None"), is_missing("")
    (True, True, False, False)
    """
    return value is None or (isinstance(value, float) and math.isnan(value))


def drop_missing(value: Any) -> Any:
    """Return a cell without the fields that hold no value, at every depth of its lists and dictionaries.

    A table of stated types gives each dictionary the fields that any row has, so nulls say nothing about a row.

    >>> drop_missing([{"x": 1, "y": None, "z": {"a": None}}, None])
    [{'x': 1, 'z': {}}, None]
    """
    if isinstance(value, dict):
        return {name: drop_missing(item) for name, item in value.items() if not is_missing(item)}
    return [drop_missing(item) for item in value] if isinstance(value, list) else value


def to_text(value: Any, column: str) -> str:
    """Return the text of one cell, which depends on nothing but the cell.

    Text stays as it is, and a missing cell is empty. A number is written with as few digits as tell it from others,
    a whole one without a decimal point, whatever the type of its column. Truth values are `true` and `false`, and dates
    and times are in the form of ISO 8601.

    Args:
        value: the cell.
        column: the column's name, for messages.

    Raises:
        ValueError: the value is a list, a dictionary or another thing that has no text of its own.

    >>> to_text("4.0", "stars"), to_text(4.0, "stars"), to_text(0.1, "stars"), to_text(True, "ok")
    ('4.0', '4', '0.1', 'true')
    >>> to_text(datetime.date(2024, 1, 5), "when")
    '2024-01-05'
    """
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, np.generic):
        return to_text(value.item(), column)
    if isinstance(value, int | float | decimal.Decimal):
        return _write_number(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise ValueError(
        f"column={column}: it holds values of type {type(value).__name__}, which are no text; join them into "
        "one, or choose a task that takes them, such as chat or token-classification."
    )


def _write_number(value: float | decimal.Decimal) -> str:
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT
    return str(int(value)) if is_whole else str(value)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a column by name, in the order of a head's outputs. They are public, and never read off rows.

    A cell belongs to the class that is written like it. If there is none, it belongs to the only class that is the same
    number, such as 0 and 0.0, or the same truth value, such as yes, True and on.

    Args:
        names: the classes, as they are written.

    Raises:
        ValueError: two classes have one name.

    >>> Classes(names=("no", "yes")).find("yes"), Classes(names=("no", "yes")).find(True)
    (1, 1)
    >>> Classes(names=("0", "1")).find("1.0"), Classes(names=("01", "1")).find("01"), Classes(names="ab").find("c")
    (1, 0, None)
    """

    names: Sequence[str]

    def __post_init__(self) -> None:
        if len({*self.names}) < len(self.names):
            raise ValueError(f"classes={', '.join(self.names)}: two have the same name; remove one.")

    def find(self, cell: Any, column: str = "label") -> int | None:
        """Return the number of the class of a cell; `None` if it is missing, or of no class."""
        text = to_text(cell, column).strip()
        found = self._as_written.get(text)
        return self._as_meant.get(_read_meaning(text)) if found is None else found

    @cached_property
    def _as_written(self) -> dict[str, int]:
        return {name.strip(): number for number, name in enumerate(self.names)}

    @cached_property
    def _as_meant(self) -> dict[tuple[str, float], int | None]:
        """The class of each meaning; `None` where two classes have one, such as 1 and 01."""
        meanings = [_read_meaning(name.strip()) for name in self.names]
        return {
            meaning: number if meanings.count(meaning) == 1 else None
            for number, meaning in enumerate(meanings)
            if meaning is not None
        }


def _read_meaning(text: str) -> tuple[str, float] | None:
    """Return the number or the truth value that a text stands for, marked as one or the other."""
    if text.lower() in (*_TRUE, *_FALSE):
        return "truth", float(text.lower() in _TRUE)
    number = to_number(text)
    return None if number is None else ("number", number)


def to_number(text: str) -> float | None:
    """Return the number that a text is, or `None`.

    >>> to_number(" 3.5"), to_number("1e-3"), to_number("nan"), to_number("three"), to_number("1_000")
    (3.5, 0.001, None, None, None)
    """
    try:
        number = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
