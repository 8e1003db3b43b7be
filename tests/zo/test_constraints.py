"""Anchors pull back, balls confine, and the remembered origin is a copy."""

import pytest
import torch

from hf_dpzo.zo.constraints import Ball, QuadraticAnchor
from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.optimizer import ZOOptimizer


def optimizer_of(theta, constraint, lr=0.1) -> ZOOptimizer:
    return ZOOptimizer([theta], directions=Rademacher, seed=0, lr=lr, constraint=constraint)


def move(optimizer, step, coefficient) -> None:
    optimizer.receive(step=step, coefficients=[coefficient])
    optimizer.step()


def test_anchor_does_not_alias_the_weights():
    """In the published code it does, so its regularizer is always zero."""
    theta = torch.nn.Parameter(torch.randn(50))
    start = theta.detach().clone()
    origin = QuadraticAnchor(strength=1.0).capture_origin([theta], None)
    with torch.no_grad():
        theta.add_(1.0)
    assert torch.equal(origin[0], start)


def test_anchor_pulls_back_to_where_the_stage_began():
    theta = torch.nn.Parameter(torch.randn(50))
    start = theta.detach().clone()
    optimizer = optimizer_of(theta, QuadraticAnchor(strength=2.0))
    optimizer.begin_stage()
    move(optimizer, 0, 30.0)
    distances = [(theta - start).norm().item()]
    for step in range(1, 30):
        move(optimizer, step, 0.0)
        distances.append((theta - start).norm().item())
    assert distances == pytest.approx([distances[0] * 0.8**step for step in range(30)], rel=1e-3)


def test_a_new_stage_has_a_new_anchor():
    theta = torch.nn.Parameter(torch.zeros(50))
    optimizer = optimizer_of(theta, QuadraticAnchor(strength=2.0))
    optimizer.begin_stage()
    move(optimizer, 0, 1.0)
    optimizer.begin_stage()
    middle = theta.detach().clone()
    for step in range(1, 4):
        move(optimizer, step, 0.0)
    assert torch.equal(theta.detach(), middle)


def test_ball_confines_all_parameters_as_one_vector():
    parameters = [torch.randn(7, 3), torch.randn(100_000)]
    ball = Ball(radius=0.5)
    origin = ball.capture_origin(parameters, None)
    displacements = [torch.randn_like(p) for p in parameters]
    for parameter, displacement in zip(parameters, displacements, strict=True):
        parameter.add_(displacement)
    ball.project_(parameters, origin)
    length = torch.cat([displacement.flatten() for displacement in displacements]).norm()
    for parameter, start, displacement in zip(parameters, origin, displacements, strict=True):
        torch.testing.assert_close(parameter, start + displacement * 0.5 / length, rtol=1e-4, atol=1e-6)


def test_nothing_is_projected_within_the_ball():
    parameters = [torch.randn(10)]
    origin = Ball(radius=100.0).capture_origin(parameters, None)
    parameters[0].add_(1.0)
    before = parameters[0].clone()
    Ball(radius=100.0).project_(parameters, origin)
    assert torch.equal(parameters[0], before)


def test_ball_stays_around_the_initial_weights():
    ball = Ball(radius=1.0)
    first = ball.capture_origin([torch.zeros(2)], None)
    assert ball.capture_origin([torch.ones(2)], first) is first
