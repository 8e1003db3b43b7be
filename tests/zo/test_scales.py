"""Scaled directions move parameters as a change of variables does: theta = scale * phi, where phi moves without one."""

import numpy as np
import pytest
import torch

from hf_dpzo.zo.constraints import QuadraticAnchor
from hf_dpzo.zo.directions import DIRECTIONS, Gaussian, Rademacher
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.shift import shifted
from hf_dpzo.zo.updates import SGD, Momentum
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk, ProbePoint, StackingWalk


# Powers of two, by which a product is not rounded.
SCALES = (0.25, 1.0, 8.0)
SHAPES = ((5, 3), (7,), (130,))
POINTS = [ProbePoint(direction=k, position=sign * 0.5) for k in range(2) for sign in (1, -1)]


def draw(scales=(1.0, 1.0, 1.0)) -> list[torch.nn.Parameter]:
    values = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(scale * torch.randn(shape, generator=values))
        for shape, scale in zip(SHAPES, scales, strict=True)
    ]


def assert_scaled(scaled, plain) -> None:
    for one, other, scale in zip(scaled, plain, SCALES, strict=True):
        assert torch.equal(one, other * scale)


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("update", [SGD(), Momentum()], ids=["sgd", "momentum"])
@pytest.mark.parametrize("constraint", [None, QuadraticAnchor(strength=0.5)], ids=["free", "anchored"])
def test_a_run_with_scales_is_the_run_of_other_variables(directions, update, constraint):
    options = {"directions": DIRECTIONS[directions], "seed": 3, "lr": 0.5, "weight_decay": 0.125}
    runs = {}
    for name, parameters in {"plain": draw(), "scaled": draw(SCALES)}.items():
        optimizer = ZOOptimizer(parameters, **options, update=update, constraint=constraint)
        if name == "scaled":
            optimizer.scale_directions(SCALES)
        optimizer.begin_stage()
        for step in range(3):
            optimizer.receive(step=step, coefficients=[0.5, -0.25])
            optimizer.step()
        runs[name] = parameters
    if update == SGD():  # Moments add up products of other sizes.
        assert_scaled(runs["scaled"], runs["plain"])
    for one, other, scale in zip(runs["scaled"], runs["plain"], SCALES, strict=True):
        torch.testing.assert_close(one, other * scale)


@pytest.mark.parametrize("kind", [CopyingWalk, AddingWalk, StackingWalk])
def test_every_walk_visits_the_scaled_points(kind):
    visited = {}
    for name, scales in {"plain": (1.0, 1.0, 1.0), "scaled": SCALES}.items():
        parameters = draw(scales)
        directions = Rademacher(seed=1, sizes=[p.numel() for p in parameters], scales=scales)
        options = {"points_per_stop": 2} if kind is StackingWalk else {}
        with kind(parameters, directions, step=4, points=POINTS, **options) as walk:
            visited[name] = [
                [(stop.stacks.get(p, p)).detach().clone() for p in parameters] for stop in walk
            ]  # fmt: skip
    for one, other in zip(visited["scaled"], visited["plain"], strict=True):
        assert_scaled(one, other)


def test_a_mask_and_the_way_back_keep_the_scales():
    mask = Mask([np.arange(np.prod(shape)) % 2 == 0 for shape in SHAPES])
    parameters = draw(SCALES)
    optimizer = ZOOptimizer(parameters, directions=Gaussian, seed=1, lr=0.5)
    optimizer.scale_directions(SCALES)
    optimizer.begin_stage(mask=mask)
    assert optimizer.directions.scales == SCALES
    before = [parameter.detach().clone() for parameter in parameters]
    with shifted(dict(enumerate(parameters)), optimizer.directions, {0: 0.5}):
        assert not torch.equal(parameters[2], before[2])
    assert all(map(torch.equal, parameters, before))
    with pytest.raises(RuntimeError, match="it has begun with other scales"):
        optimizer.scale_directions(SCALES)


def test_read_settled_undoes_a_scaled_displacement():
    parameters = draw(SCALES)
    expected = parameters[2].detach()[:4].clone()
    optimizer = ZOOptimizer(parameters, directions=Rademacher, seed=1, lr=0.5)
    optimizer.scale_directions(SCALES)
    optimizer.begin_stage()
    walk = AddingWalk(parameters, optimizer.directions, step=0, points=POINTS)
    with optimizer.follow(walk, step=0):
        list(walk)
    assert not torch.equal(parameters[2][:4], expected)
    torch.testing.assert_close(optimizer.read_settled(2, torch.arange(4)), expected)
    optimizer.settle()
    torch.testing.assert_close(parameters[2][:4].detach(), expected)
