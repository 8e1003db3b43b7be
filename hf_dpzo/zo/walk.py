"""The walk through a step's probe points: each forward pass finds the parameters at the next of them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Self

import torch

from hf_dpzo.zo.directions import Directions


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """The point `theta + position * z` along one direction."""

    direction: int
    position: float


THETA = ProbePoint(direction=0, position=0.0)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The probe points that one forward pass evaluates.

    Args:
        index: the number of the stop within its step, from 0.
        points: one point, or several where the parameters are stacked.
        stacks: for each parameter its values at the points, `[points, *shape]`; empty where the parameters themselves
            have moved to the one point.
    """

    index: int
    points: tuple[ProbePoint, ...]
    stacks: Mapping[torch.Tensor, torch.Tensor] = field(default_factory=dict)


class Walk(AbstractContextManager):
    """Leads the parameters through the probe points of one step; iterating makes the stops.

    A walk starts at theta. It is a context, which must be left even where what happens at a stop raises.

    Args:
        parameters: the trainable parameters, in the order of `directions.sizes`.
        directions: the source of the directions.
        step: the step, from 0.
        points: the probe points, in the order of the walk.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], directions: Directions, *, step: int, points: Sequence[ProbePoint]
    ) -> None:
        self._parameters, self._directions, self._step, self._points = parameters, directions, step, points
        # The point at which the parameters are.
        self.at = THETA

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """Whether the walk ends at exactly the theta that it began at."""

    @abstractmethod
    def __iter__(self) -> Iterator[Stop]: ...


class MovingWalk(Walk):
    """A walk that moves the parameters themselves, to one point after the other."""

    def __iter__(self) -> Iterator[Stop]:
        for index, point in enumerate(self._points):
            self.move_to(point)
            yield Stop(index=index, points=(point,))

    @abstractmethod
    def move_to(self, point: ProbePoint) -> None:
        """Set the parameters to their values at `point`."""

    def _add(self, weights: Mapping[int, float]) -> None:
        for index, parameter in enumerate(self._parameters):
            self._directions.add_(parameter, index=index, step=self._step, weights=weights)


class AddingWalk(MovingWalk):
    """Moves in one sweep over the parameters, keeps no copy, and stays at the last point.

    Each move rounds, so theta changes by about one unit in the last place. By how much depends on public values alone:
    a replay that makes the same moves ends at the same bits. That is why an empty batch is walked too: whether a batch
    was empty is not public.
    """

    is_exact = False

    def __exit__(self, *_: object) -> None:
        """Stay at the last point."""

    def move_to(self, point: ProbePoint) -> None:
        """Move there from the point before, in one sweep."""
        weights = {self.at.direction: -self.at.position}
        weights[point.direction] = weights.get(point.direction, 0.0) + point.position
        weights = {direction: weight for direction, weight in weights.items() if weight != 0.0}
        if weights:
            self._add(weights)
        self.at = point


class CopyingWalk(MovingWalk):
    """Starts each move from a copy, and so ends at exactly theta. For small trainable sets, such as adapters."""

    is_exact = True

    def __enter__(self) -> Self:
        self._copies = [parameter.detach().clone() for parameter in self._parameters]
        return self

    def __exit__(self, *_: object) -> None:
        """Go back to theta."""
        self.move_to(THETA)

    @torch.no_grad()
    def move_to(self, point: ProbePoint) -> None:
        """Move there from the copy."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(copy)
        self.at = THETA
        if point.position != 0.0:
            self.at = point
            self._add({point.direction: point.position})


class StackingWalk(Walk):
    """Moves nothing: each stop stacks copies of the parameters at several points, for one pass through a small adapter.

    Args:
        parameters: as in `Walk`.
        directions: as in `Walk`.
        step: as in `Walk`.
        points: as in `Walk`.
        points_per_stop: the height of each stack. The last one repeats the last point until it is as high, so that all
            passes have the same shape.
    """

    is_exact = True

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        directions: Directions,
        *,
        step: int,
        points: Sequence[ProbePoint],
        points_per_stop: int,
    ) -> None:
        super().__init__(parameters, directions, step=step, points=points)
        self._height = points_per_stop

    def __exit__(self, *_: object) -> None:
        """Nothing has moved."""

    def __iter__(self) -> Iterator[Stop]:
        padded = [*self._points, *self._points[-1:] * self._height]
        for index, first in enumerate(range(0, len(self._points), self._height)):
            points = tuple(padded[first : first + self._height])
            stacks = stack(self._parameters, self._directions, step=self._step, points=points)
            yield Stop(index=index, points=points, stacks=stacks)


def stack(
    parameters: Sequence[torch.Tensor], directions: Directions, *, step: int, points: Sequence[ProbePoint]
) -> dict[torch.Tensor, torch.Tensor]:
    """Return each parameter's values at `points`, `[points, *shape]`, to the bit those to which a walk moves it."""
    stacks = {one: one.detach().expand(len(points), *one.shape).clone() for one in parameters}
    for row, point in enumerate(points):
        for index, values in enumerate(stacks.values() if point.position else ()):
            directions.add_(values[row], index=index, step=step, weights={point.direction: point.position})
    return stacks
