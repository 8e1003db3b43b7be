"""Losses along a walk."""

import torch


def compare_along(walk, estimator, losses) -> torch.Tensor:
    """The coefficients `[rows, K]` of what `losses` returns at each stop of `walk`."""
    with walk:
        return estimator.coefficients(torch.stack([losses().double() for _ in walk], dim=1))
