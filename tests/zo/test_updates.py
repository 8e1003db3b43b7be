"""Momentum, Adam and the normalized step, compared with their formulas on dense directions."""

import pytest
import torch

from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.updates import UPDATES, Adam, Momentum, NormalizedSGD


COEFFICIENTS = [[0.5, -2.0, 1.0], [1.5, 0.25, -0.75], [-1.0, 0.0, 3.0], [0.1, 0.2, 0.4]]
RATE = 0.05


def run(update, kind="gaussian") -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the initial weights, the final weights, and the dense estimated gradients."""
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), torch.nn.Parameter(torch.ones(5))]
    start = torch.cat([p.detach().flatten() for p in parameters])
    optimizer = ZOOptimizer(parameters, directions=DIRECTIONS[kind], seed=3, lr=RATE, update=update)
    optimizer.begin_stage()
    gradients = []
    for step, coefficients in enumerate(COEFFICIENTS):
        z = [
            torch.cat([optimizer.directions.values(index=i, step=step, direction=k) for i in (0, 1)]) for k in range(3)
        ]
        gradients.append(sum(c * direction for c, direction in zip(coefficients, z, strict=True)))
        optimizer.receive(step=step, coefficients=coefficients)
        optimizer.step()
    return start, torch.cat([p.detach().flatten() for p in parameters]), gradients


def test_momentum_is_heavy_ball():
    theta, end, gradients = run(Momentum(momentum=0.7))
    velocity = torch.zeros_like(theta)
    for gradient in gradients:
        velocity = 0.7 * velocity + gradient
        theta = theta - RATE * velocity
    torch.testing.assert_close(end, theta)


def test_adam_follows_kingma_and_ba():
    theta, end, gradients = run(Adam(betas=(0.8, 0.95), epsilon=1e-6))
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, gradient in enumerate(gradients, start=1):
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        theta = theta - RATE * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
    torch.testing.assert_close(end, theta, rtol=1e-5, atol=1e-5)


def test_normalized_step_is_in_units_of_the_spread():
    theta, end, gradients = run(NormalizedSGD())
    for gradient, coefficients in zip(gradients, COEFFICIENTS, strict=True):
        theta = theta - RATE * gradient / torch.tensor(coefficients).std()
    torch.testing.assert_close(end, theta)


def test_a_normalized_step_without_a_spread_is_zero():
    assert NormalizedSGD().scale([1.0, 1.0]) == [0.0, 0.0]


def after_one_step(name, size) -> tuple[torch.nn.Parameter, ZOOptimizer]:
    theta = torch.nn.Parameter(torch.ones(size))
    optimizer = ZOOptimizer([theta], directions=DIRECTIONS["rademacher"], seed=0, lr=0.1, update=UPDATES[name]())
    optimizer.begin_stage()
    optimizer.receive(step=0, coefficients=[1.0])
    optimizer.step()
    return theta, optimizer


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_moments_are_reset_at_each_stage(name):
    """Otherwise a coordinate that a new mask leaves out would keep moving."""
    theta, optimizer = after_one_step(name, 40)
    selected = torch.arange(40) < 10
    optimizer.begin_stage(mask=Mask([selected.numpy()]))
    before = theta.detach().clone()
    optimizer.receive(step=1, coefficients=[1.0])
    optimizer.step()
    assert torch.equal(before != theta, selected)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_moments_are_kept_in_memory_and_not_saved(name):
    """They follow from the log of the run."""
    theta, optimizer = after_one_step(name, 4)
    assert len(optimizer.state) == 1
    assert optimizer.state_dict()["state"] == {}
    assert theta.grad is None


def test_groups_keep_their_own_rates():
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = ZOOptimizer(
        [{"params": [first]}, {"params": [second], "lr": 1.0}],
        directions=DIRECTIONS["rademacher"],
        seed=0,
        lr=0.1,
        update=Momentum(),
    )
    optimizer.begin_stage(rate_factor=0.5)
    optimizer.receive(step=0, coefficients=[2.0])
    optimizer.step()
    assert first.abs().tolist() == pytest.approx([0.1] * 3)
    assert second.abs().tolist() == pytest.approx([1.0] * 3)
