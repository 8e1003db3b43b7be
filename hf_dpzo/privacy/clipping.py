"""The integer lattice that rows are clipped to, and on which noise is drawn.

A row of norm up to `clip_norm` becomes a row of integers of norm up to 2**40. Rows are summed in int64, so a sum does
not depend on their order or on how they were grouped, and one row moves it by at most 2**40: exactly, not up to
rounding.
"""

import math
from typing import Literal

import numpy as np
import torch

from hf_dpzo.privacy.queries import MAX_NOISE_MULTIPLIER


LATTICE_BITS = 40


# The clip norm in lattice steps: the most by which one row moves a sum.
SENSITIVITY = 1 << LATTICE_BITS


# More rows than this could overflow a sum in int64. Each column is summed by itself, so K does not matter.
MAX_ROWS = 1 << 22


def clip_to_lattice(coefficients: torch.Tensor, clip_norm: float, order: Literal[1, 2] = 2) -> np.ndarray:
    """Clip each row to `clip_norm`, and truncate it toward zero to integers, in lattice steps of `clip_norm / 2**40`.

    Args:
        coefficients: one row for each example, float `[batch, K]`. Values that are not finite count as zero. SENSITIVE.
        clip_norm: the largest norm that a row keeps.
        order: the order of the norm, 2 for L2 or 1 for L1.

    Returns:
        The rows of integers, int64 `[batch, K]`. SENSITIVE.

    Guarantee: the norm of each row of integers is at most 2**40, exactly.

    Raises:
        ValueError: there are more rows than a sum in int64 can hold, or not two axes.

    >>> clip_to_lattice(torch.tensor([[3.0, 4.0], [float("nan"), 0.5]]), clip_norm=1.0) * 2.0**-40
    array([[0.6, 0.8],
           [0. , 0.5]])
    """
    rows = as_rows(coefficients)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"a logical batch holds more than {MAX_ROWS} rows: lower expected_batch_size.")
    rows = np.where(np.isfinite(rows), rows, 0.0)
    # Dividing by the largest entry first keeps the squares of huge and of tiny entries within the range of float64.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    shape = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    norm_of_shape = np.linalg.norm(shape, ord=order, axis=1, keepdims=True)
    # One lattice step short of the clip norm, so that no rounding error of float64 (some 2**-50) can exceed it.
    with np.errstate(over="ignore"):
        allowed = np.minimum(largest / clip_norm, (1 - 2.0**-LATTICE_BITS) / np.maximum(norm_of_shape, 1.0))
    return np.trunc(shape * (allowed * SENSITIVITY)).astype(np.int64)


def lattice_scale(noise_multiplier: float, sensitivity: int) -> int:
    """Return the scale of the noise in lattice steps, rounded up.

    Args:
        noise_multiplier: the scale of the noise over the sensitivity.
        sensitivity: the sensitivity in lattice steps.

    Raises:
        ValueError: the scale may exceed the integers that float64 holds exactly.
    """
    if not noise_multiplier < MAX_NOISE_MULTIPLIER:
        raise ValueError(
            f"noise_multiplier={noise_multiplier:g} clip norms: from {MAX_NOISE_MULTIPLIER} on, noise is not exact; "
            "lower it, or raise target_epsilon."
        )
    return math.ceil(noise_multiplier * sensitivity)


def as_rows(coefficients: torch.Tensor) -> np.ndarray:
    """Return `coefficients` as float64 `[batch, K]`, or raise `ValueError` unless they have two axes."""
    if coefficients.ndim != 2:
        raise ValueError(
            f"ndim={coefficients.ndim}: the mechanism takes one row for each example, [batch, directions]."
        )
    return coefficients.detach().cpu().double().numpy()
