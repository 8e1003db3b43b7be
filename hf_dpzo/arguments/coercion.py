"""Checks and converts the values of single flags, because YAML and command lines may spell numbers as text."""

import contextlib
import json
from collections.abc import Collection, Mapping


# Larger numbers are infinite in float32.
MAX_FLOAT32 = 3e38


# An expected batch size of as many units as there are.
ALL_UNITS = "all"


def coerce_positive(name: str, value: float | str | None, *, allow_zero: bool = False) -> float | None:
    """Return `value` as a number above zero, and `None` as it is; raise `ValueError` for anything else.

    >>> coerce_positive("smoothing", "1e-3")
    0.001
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: it must be a number.") from None
    if not (number > 0 or (allow_zero and number == 0)):
        raise ValueError(f"{name}={number:g}: it must be {'positive or 0' if allow_zero else 'positive'}.")
    if number > MAX_FLOAT32:
        raise ValueError(f"{name}={number:g}: it must be finite in float32.")
    return number


def coerce_count(name: str, value: int | str | None) -> int | None:
    """Return `value` as a whole number above zero, and `None` as it is; raise `ValueError` for anything else."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not (1 <= number < 2**31 and number == int(number)):
        raise ValueError(f"{name}={value}: it must be a whole number from 1 to 2**31 - 1.")
    return int(number)


def coerce_batch_size(value: int | str | None) -> int | str:
    """Return `value` as a whole number above zero, or `all`; raise `ValueError` for anything else.

    >>> coerce_batch_size("64"), coerce_batch_size("all")
    (64, 'all')
    """
    if value == ALL_UNITS:
        return ALL_UNITS
    try:
        number = coerce_count("expected_batch_size", value)
    except ValueError:
        number = None
    if number is None:
        raise ValueError(
            f"expected_batch_size={value}: it must be a whole number from 1 to 2**31 - 1, or {ALL_UNITS} for every row."
        )
    return number


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise `ValueError` unless `value` is one of the names in `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(sorted(choices))}.")


def coerce_scales(value: Mapping[str, float] | str | None) -> dict[str, float] | None:
    """Return a mapping from parts of names to positive numbers, which command lines spell as JSON; `None` as it is.

    >>> coerce_scales('{"score": 1e-2}')
    {'score': 0.01}
    """
    if value is None:
        return None
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"perturbation_scales={value!r}: it is no mapping; write {{part of a name: scale}}.")
    return {str(name): coerce_positive(f"perturbation_scales[{name}]", scale) for name, scale in value.items()}


def coerce_list(name: str, value: Collection[object] | None) -> list[object]:
    """Return `value` as a list, empty for `None`; raise `ValueError` unless it is a list or a tuple."""
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"{name}={value!r}: it must be a list.")
    return list(value or ())
