"""Weights that are moved along public directions and back, in several types and ways of rounding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hf_dpzo.zo.directions import Rademacher


# Keys the bits that rounding draws apart from those that directions are made of.
_ROUNDING = int.from_bytes(b"rounding", "big")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How weights are kept and rounded.

    Args:
        dtype: of the weights.
        stochastic: whether a sum is rounded up or down at random, by how near it is, with bits from a public seed.
        copied: whether weights are put back from a copy, and not by walking back; then updates alone are stochastic.
    """

    dtype: torch.dtype = torch.bfloat16
    stochastic: bool = False
    copied: bool = False


class Walker:
    """Adds multiples of public directions to weights, and rounds."""

    def __init__(self, parameters: list[torch.nn.Parameter], way: Way, seed: int) -> None:
        self.parameters, self.way, self._seed, self._count = parameters, way, seed, 0
        self.directions = Rademacher(seed=seed, sizes=[parameter.numel() for parameter in parameters])
        self._copies = [parameter.clone() for parameter in parameters] if way.copied else []

    def add(self, step: int, distance: float, *, update: bool = False) -> None:
        """Add `distance` times the direction of `step`, and round."""
        self._count += 1
        for index, parameter in enumerate(self.parameters):
            moved = self.directions.values(index=index, step=step, direction=0).mul_(distance)
            moved = moved.view_as(parameter).add_(parameter.float())
            if self.way.stochastic and (update or not self.way.copied):
                moved = stochastically(moved, self._bits(index, parameter.numel()))
            parameter.copy_(moved)

    def back(self, step: int, distance: float) -> None:
        """Undo `add` of the negative `distance`."""
        if not self.way.copied:
            self.add(step, distance)
        for parameter, copy in zip(self.parameters, self._copies, strict=False):
            parameter.copy_(copy)

    def differences(self, step: int, losses: Callable[[], torch.Tensor], smoothing: float) -> torch.Tensor:
        """The losses' differences `[rows]` over twice the smoothing; then the weights are put back."""
        self.add(step, smoothing)
        above = losses()
        if self.way.copied:
            self.back(step, -smoothing)
            self.add(step, -smoothing)
        else:
            self.add(step, -2 * smoothing)
        below = losses()
        self.back(step, smoothing)
        return (above - below) / (2 * smoothing)

    def update(self, step: int, distance: float) -> None:
        """Take a step, and remember where it led to."""
        self.add(step, distance, update=True)
        for parameter, copy in zip(self.parameters, self._copies, strict=False):
            copy.copy_(parameter)

    def _bits(self, index: int, count: int) -> torch.Tensor:
        """16 uniform bits for each coordinate, from a counter: whoever has the seed can draw them again."""
        philox = np.random.Philox(
            key=np.array([self._seed, _ROUNDING], dtype=np.uint64),
            counter=np.array([0, 0, index, self._count], dtype=np.uint64),
        )
        return torch.from_numpy(philox.random_raw(-(-count // 4)).view(np.uint16)[:count].astype(np.int32))


def stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Round float32 `values` to bfloat16, up or down with the probability that makes the mean right."""
    whole = values.contiguous().view(torch.int32) + bits.view_as(values)
    return (whole & -65536).view(torch.float32)
