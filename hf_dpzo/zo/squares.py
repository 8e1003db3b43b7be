"""Sums of squares that every machine computes alike."""

import numpy as np
import torch


def sum_of_squares(values: torch.Tensor) -> float:
    """Return the sum of squares of `values`, in float64.

    NumPy adds in an order that does not depend on the number of threads, so a replay gets the same bits.

    >>> sum_of_squares(torch.tensor([3.0, 4.0]))
    25.0
    """
    return float(np.square(values.numpy().astype(np.float64)).sum())
