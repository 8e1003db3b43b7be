"""From probe point to probe point of a step, and back to theta."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hf_dpzo.zo.directions import Directions


@dataclass(frozen=True, kw_only=True)
class Point:
    """A probe point: `theta + position * z` of one direction."""

    direction: int
    position: float


THETA = Point(direction=0, position=0.0)


class Walk(ABC):
    """Moves parameters from probe point to probe point of one step. It starts at theta; a context ends it.

    Args:
        parameters: the trainable parameters, in the order of `directions.sizes`.
        directions: where the directions come from.
        step: the step, from 0.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], directions: Directions, *, step: int) -> None:
        self._parameters, self._directions, self._step = parameters, directions, step

    @abstractmethod
    def to(self, point: Point) -> None:
        """Set the parameters to those of `point`."""

    @abstractmethod
    def __enter__(self) -> "Walk": ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def _add(self, weights: Mapping[int, float]) -> None:
        for index, parameter in enumerate(self._parameters):
            self._directions.add_(parameter, index=index, step=self._step, weights=weights)


class AddingWalk(Walk):
    """Goes on from where it is, in one sweep over the parameters, and keeps no copy.

    Each move rounds, so theta is changed by about one unit in the last place. By how much depends on public values
    alone: a replay that makes the same moves ends at the same bits. That is why an empty batch is walked too: whether a
    batch was empty is not public.

    Args:
        stay: told where the walk ends, with or without an error; the parameters stay there.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        directions: Directions,
        *,
        step: int,
        stay: Callable[[int, Point], None],
    ) -> None:
        super().__init__(parameters, directions, step=step)
        self._at, self._stay = THETA, stay

    def to(self, point: Point) -> None:
        """Set the parameters to those of `point`."""
        weights = {self._at.direction: -self._at.position}
        weights[point.direction] = weights.get(point.direction, 0.0) + point.position
        weights = {direction: weight for direction, weight in weights.items() if weight != 0.0}
        if weights:
            self._add(weights)
        self._at = point

    def __enter__(self) -> "AddingWalk":
        return self

    def __exit__(self, *_: object) -> None:
        self._stay(self._step, self._at)


class CopyingWalk(Walk):
    """Starts each move from a copy, so it ends at exactly theta. For small trainable sets, such as adapters."""

    @torch.no_grad()
    def to(self, point: Point) -> None:
        """Set the parameters to those of `point`."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(copy)
        if point.position != 0.0:
            self._add({point.direction: point.position})

    def __enter__(self) -> "CopyingWalk":
        self._copies = [parameter.detach().clone() for parameter in self._parameters]
        return self

    def __exit__(self, *_: object) -> None:
        self.to(THETA)


def stacked(
    parameters: Sequence[torch.Tensor], directions: Directions, *, step: int, points: Sequence[Point]
) -> list[torch.Tensor]:
    """Return copies of the parameters at each of `points`, `[points, *shape]`, bit for bit where a walk takes them."""
    stacks = [one.detach().expand(len(points), *one.shape).clone() for one in parameters]
    for row, point in enumerate(points):
        for index, stack in enumerate(stacks if point.position else ()):
            directions.add_(stack[row], index=index, step=step, weights={point.direction: point.position})
    return stacks
