"""The walk through a step's probe points. Each stop of it is one forward pass."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Self

import torch

from hf_dpzo.zo.directions import Directions


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """The point `theta + position * z_k` along one direction.

    Args:
        direction: k, the number of the direction, from 0.
        position: the signed distance from theta, in units of z.
    """

    direction: int
    position: float


THETA = ProbePoint(direction=0, position=0.0)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What one forward pass evaluates: a probe point, or several.

    Args:
        index: the stop's number within its step, from 0.
        points: the one point that the parameters have moved to, or the several points of `stacks`.
        stacks: the values of each parameter at the points, `[points, *shape]`; empty if the parameters themselves have
            moved.
        checksums: the checksums of moved parameters, of those that the sweep to this stop has taken.
    """

    index: int
    points: tuple[ProbePoint, ...]
    stacks: Mapping[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    checksums: Mapping[torch.Tensor, int] = field(default_factory=dict)


class Walk(AbstractContextManager):
    """Leads the parameters through the probe points of one step. Iterate over it to reach stop after stop.

    A walk starts at theta. Use it as a context manager, so that it ends properly even if a stop's evaluation raises.

    Args:
        parameters: the trainable parameters, in the order of `directions.sizes`.
        directions: the source of the directions.
        step: the step, from 0.
        points: the probe points, in the order of the walk.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], directions: Directions, *, step: int, points: Sequence[ProbePoint]
    ) -> None:
        self._parameters = parameters
        self._directions = directions
        self._step = step
        self._points = points
        # The point at which the parameters are.
        self.at = THETA

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """Whether the walk ends at exactly the theta that it began at."""

    @abstractmethod
    def __iter__(self) -> Iterator[Stop]: ...


class MovingWalk(Walk):
    """A walk that moves the parameters themselves from point to point."""

    def __iter__(self) -> Iterator[Stop]:
        for index, point in enumerate(self._points):
            self.move_to(point)
            checksums = self._directions.swept.find(self._parameters)
            yield Stop(index=index, points=(point,), checksums=checksums)

    @abstractmethod
    def move_to(self, point: ProbePoint) -> None:
        """Set the parameters to their values at `point`."""

    def _add(self, weights: Mapping[int, float]) -> None:
        self._directions.add_all_(self._parameters, step=self._step, weights=[weights] * len(self._parameters))


class AddingWalk(MovingWalk):
    """A walk that makes each move in one sweep over the parameters, keeps no copy, and stays at the last point.

    Each move rounds, so theta changes by about one unit in the last place. The rounding depends on public values alone,
    so a replay that makes the same moves ends at the same bits. Even an empty batch is walked: skipping the moves would
    show in the weights, and whether a batch was empty is not public.
    """

    is_exact = False

    def __exit__(self, *_: object) -> None:
        """Leave the parameters at the last point."""

    def move_to(self, point: ProbePoint) -> None:
        """Move the parameters from where they are to `point`, in one sweep."""
        weights = {self.at.direction: -self.at.position}
        weights[point.direction] = weights.get(point.direction, 0.0) + point.position
        weights = {direction: weight for direction, weight in weights.items() if weight != 0.0}
        if weights:
            self._add(weights)
        self.at = point


class CopyingWalk(MovingWalk):
    """A walk that starts each move from a copy of theta, and so ends at exactly theta.

    The copy is as large as the parameters, so it is for small sets of them, such as adapters.
    """

    is_exact = True

    def __enter__(self) -> Self:
        self._copies = [parameter.detach().clone() for parameter in self._parameters]
        return self

    def __exit__(self, *_: object) -> None:
        """Move the parameters back to theta."""
        self.move_to(THETA)

    @torch.no_grad()
    def move_to(self, point: ProbePoint) -> None:
        """Set the parameters to their copy, and move them from there to `point`."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(copy)
        self.at = THETA
        if point.position != 0.0:
            self.at = point
            self._add({point.direction: point.position})


class StackingWalk(Walk):
    """A walk that moves nothing: each stop stacks the parameters' values at several points, for one forward pass.

    A stack holds a copy of the parameters for each of its points, so it is for small sets of them, such as adapters.

    Args:
        parameters: the trainable parameters, in the order of `directions.sizes`.
        directions: the source of the directions.
        step: the step, from 0.
        points: the probe points, in the order of the walk.
        points_per_stop: the height of each stack. The last stack is filled up with the last point, so that all passes
            have the same shape.
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
        """Do nothing, because no parameter has moved."""

    def __iter__(self) -> Iterator[Stop]:
        padded = [*self._points, *self._points[-1:] * self._height]
        for index, first in enumerate(range(0, len(self._points), self._height)):
            points = tuple(padded[first : first + self._height])
            stacks = stack(self._parameters, self._directions, step=self._step, points=points)
            yield Stop(index=index, points=points, stacks=stacks)


def stack(
    parameters: Sequence[torch.Tensor], directions: Directions, *, step: int, points: Sequence[ProbePoint]
) -> dict[torch.Tensor, torch.Tensor]:
    """Return each parameter's values at `points`, `[points, *shape]`, with the bits that a `CopyingWalk` gives them."""
    return {
        parameter: _stack_one(parameter.detach(), index, directions, step=step, points=points)
        for index, parameter in enumerate(parameters)
    }


def _stack_one(
    parameter: torch.Tensor, index: int, directions: Directions, *, step: int, points: Sequence[ProbePoint]
) -> torch.Tensor:
    values = parameter.expand(len(points), *parameter.shape).clone()
    moves: dict[tuple[int, float], torch.Tensor] = {}
    for row, point in enumerate(points):
        if point.position == 0.0:
            continue
        move = moves.get((point.direction, -point.position))
        if move is not None:  # The other side of theta: rounding is the same for both signs.
            values[row] -= move
            continue
        move = directions.values(index=index, step=step, direction=point.direction, weight=point.position)
        move = move.to(parameter).view_as(parameter)
        moves[point.direction, point.position] = move
        values[row] += move
    return values
