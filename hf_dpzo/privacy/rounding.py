"""Rounds upper bounds so that they stay upper bounds."""

import math


def round_up(value: float, digits: int = 4) -> float:
    """Round an upper bound up to `digits` decimals, so that it stays an upper bound.

    >>> round_up(1.99991), round_up(2.0)
    (2.0, 2.0)
    """
    if math.isinf(value):
        return value
    return math.ceil(value * 10**digits) / 10**digits
