"""One value becomes text or a class by a rule that knows no other value."""

import datetime
import decimal

import numpy as np
import pytest

from hf_dpzo.data.cells import Classes, is_missing, to_number, to_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("None", "None"),
        (" 007 ", " 007 "),
        (4.0, "4"),
        (-0.5, "-0.5"),
        (1e300, "1e+300"),
        (2**70, str(2**70)),
        (np.int64(3), "3"),
        (np.float64(2.0), "2"),
        (np.bool_(True), "true"),
        (False, "false"),
        (decimal.Decimal("1.10"), "1.10"),
        (datetime.datetime(2024, 1, 5, 10, 30), "2024-01-05T10:30:00"),
        (datetime.time(10, 30), "10:30:00"),
        (None, ""),
        (float("nan"), ""),
    ],
)
def test_values_have_one_text(value, text):
    assert to_text(value, "column") == text


@pytest.mark.parametrize("value", [[], {}, (), b"a", object(), datetime.timedelta(1), np.zeros(2)])
def test_other_values_have_none(value):
    with pytest.raises(ValueError, match=r"column=column: it holds values of type \w+, which are no text"):
        to_text(value, "column")


@pytest.mark.parametrize(
    ("names", "cell", "place"),
    [
        (("-1", "1"), -1, 0),
        (("0", "1"), True, None),
        (("no", "yes"), "Yes", 1),
        (("off", "on"), False, 0),
        (("1", "2"), "1e0", 0),
        (("01", "1"), 1.0, 1),
        (("01", "001"), "1", None),
        (("a", "b"), " b ", 1),
        (("nan", "inf"), "inf", 1),
        (("a", "b"), None, None),
        (("true", "yes"), "yes", 1),
        (("true", "yes"), "on", None),
    ],
)
def test_classes_are_found_or_not(names, cell, place):
    assert Classes(names=names).find(cell) == place


def test_classes_have_names_of_their_own():
    with pytest.raises(ValueError, match="two have the same name"):
        Classes(names=("a", "a"))


def test_missing_is_not_a_word():
    assert not any(map(is_missing, ("", "NA", "nan", 0, False)))
    assert to_number("0x1") is None and to_number("1e3") == 1000
