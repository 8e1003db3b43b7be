"""Walking through the probe points, and back."""

import pytest
import torch

from hf_dpzo.zo.directions import DIRECTIONS, Rademacher
from hf_dpzo.zo.spsa import DIFFERENCES, CentralDifference, ForwardDifference
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk, ProbePoint

from support.walks import compare_along


class AddingAndBack(AddingWalk):
    """An `AddingWalk` that ends where it began, as an optimizer arranges it."""

    def __exit__(self, *_: object) -> None:
        self._add({self.at.direction: -self.at.position})


WALKS = [AddingAndBack, CopyingWalk]


def parameters() -> list[torch.Tensor]:
    return [torch.randn(6, 5), torch.randn(11)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def rows(count=4, width=41) -> torch.Tensor:
    return torch.randn(count, width)


def estimate(kind, walk, theta, data, *, smoothing=1e-2, num_directions=3, step=0):
    """Return the coefficients for the losses `sin(x . theta)`, one for each row x, and the dense directions."""
    directions = DIRECTIONS[kind](seed=0, sizes=[p.numel() for p in theta])
    estimator = CentralDifference(smoothing=smoothing, num_directions=num_directions)
    along = walk(theta, directions, step=step, points=estimator.points)
    coefficients = compare_along(along, estimator, lambda: torch.sin(data @ flat(theta)))
    z = torch.stack(
        [
            flat([directions.values(index=i, step=step, direction=k) for i in range(len(theta))])
            for k in range(num_directions)
        ]
    )
    return coefficients, z


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_coefficients_agree_with_dense_directions(kind, walk):
    theta, data = parameters(), rows()
    start = flat(theta)
    coefficients, z = estimate(kind, walk, theta, data)
    for k in range(3):
        plus, minus = (torch.sin(data @ (start + sign * 1e-2 * z[k])) for sign in (1, -1))
        expected = (plus.double() - minus.double()) / (2 * 1e-2 * 3)
        torch.testing.assert_close(coefficients[:, k], expected, rtol=0, atol=2e-4)


def test_sum_over_directions_estimates_the_gradient():
    theta, data = parameters(), rows(count=1)
    start = flat(theta)
    coefficients, z = estimate("rademacher", CopyingWalk, theta, data, num_directions=4000, smoothing=1e-3)
    gradient = (torch.cos(data @ start)[:, None] * data)[0]
    estimated = (coefficients.float() @ z)[0]
    assert torch.nn.functional.cosine_similarity(estimated, gradient, dim=0) > 0.97
    assert estimated.norm() == pytest.approx(float(gradient.norm()), rel=0.1)


def test_losses_are_subtracted_in_float64():
    coefficients, _ = estimate("rademacher", CopyingWalk, parameters(), rows())
    assert coefficients.dtype == torch.float64
    assert coefficients.shape == (4, 3)


def test_copying_walk_ends_where_it_began_to_the_last_bit():
    theta = parameters()
    before = flat(theta)
    estimate("gaussian", CopyingWalk, theta, rows())
    assert torch.equal(flat(theta), before)


def test_adding_walk_ends_within_rounding_of_where_it_began():
    theta = parameters()
    before = flat(theta)
    estimate("gaussian", AddingAndBack, theta, rows())
    assert (flat(theta) - before).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "moves"), [("central", 6), ("forward", 3)])
def test_adding_walk_goes_from_point_to_point_in_one_sweep_and_stays_at_the_last(name, moves, monkeypatch):
    """Moving from one direction to the next is one sweep along both."""
    theta, sweeps = parameters(), []
    before, add = flat(theta), Rademacher.add_
    directions = Rademacher(seed=0, sizes=[p.numel() for p in theta])
    monkeypatch.setattr(
        Rademacher, "add_", lambda self, p, **at: sweeps.append(dict(at["weights"])) or add(self, p, **at)
    )
    estimator = DIFFERENCES[name](smoothing=1e-2, num_directions=3)
    walk = AddingWalk(theta, directions, step=5, points=estimator.points)
    compare_along(walk, estimator, lambda: torch.zeros(1))
    last = ProbePoint(direction=2, position=1e-2 if name == "forward" else -1e-2)
    assert walk.at == last
    assert len(sweeps) == moves * len(theta)
    z = flat([directions.values(index=i, step=5, direction=2) for i in range(len(theta))])
    torch.testing.assert_close(flat(theta), before + last.position * z, rtol=0, atol=1e-6)


def test_adding_walk_leaves_the_same_bits_for_any_data():
    """Empty batches are walked too: the rounding left in the weights must not reveal that a batch was empty."""
    ends = []
    for data in (rows(count=0), rows(count=1), rows(count=9)):
        torch.manual_seed(1)
        theta = parameters()
        estimate("rademacher", AddingAndBack, theta, data)
        ends.append(flat(theta))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_empty_batch_has_no_rows_and_all_columns():
    coefficients, _ = estimate("rademacher", AddingAndBack, parameters(), rows(count=0))
    assert coefficients.shape == (0, 3)


@pytest.mark.parametrize("walk", WALKS)
def test_an_error_at_a_probe_point_restores_the_parameters(walk):
    theta = parameters()
    before = flat(theta)
    directions = Rademacher(seed=0, sizes=[p.numel() for p in theta])

    def broken() -> torch.Tensor:
        raise KeyboardInterrupt

    estimator = CentralDifference(smoothing=1e-2, num_directions=1)
    with pytest.raises(KeyboardInterrupt):
        compare_along(walk(theta, directions, step=0, points=estimator.points), estimator, broken)
    assert (flat(theta) - before).abs().max() < 1e-6


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_forward_coefficients_agree_with_dense_directions(kind, walk):
    theta, data = parameters(), rows()
    start = flat(theta)
    directions = DIRECTIONS[kind](seed=0, sizes=[p.numel() for p in theta])
    estimator = ForwardDifference(smoothing=1e-2, num_directions=3)
    along = walk(theta, directions, step=0, points=estimator.points)
    coefficients = compare_along(along, estimator, lambda: torch.sin(data @ flat(theta)))
    for k in range(3):
        z = flat([directions.values(index=i, step=0, direction=k) for i in range(len(theta))])
        expected = (torch.sin(data @ (start + 1e-2 * z)).double() - torch.sin(data @ start).double()) / (1e-2 * 3)
        torch.testing.assert_close(coefficients[:, k], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("name", "passes"), [("central", 8), ("forward", 5)])
def test_the_stated_number_of_forward_passes_is_the_number_of_calls(name, passes):
    theta, calls = parameters(), []
    directions = Rademacher(seed=0, sizes=[p.numel() for p in theta])
    estimator = DIFFERENCES[name](smoothing=1e-2, num_directions=4)
    walk = CopyingWalk(theta, directions, step=0, points=estimator.points)
    compare_along(walk, estimator, lambda: calls.append(None) or torch.zeros(2))
    assert len(calls) == estimator.forward_passes == passes


def test_bias_of_forward_differences_is_half_the_curvature_times_mu():
    """On a quadratic both are exact: central differences have no bias, forward ones have mu / 2 * z' H z."""
    theta = [torch.zeros(6, dtype=torch.float64)]
    curvature = torch.arange(1.0, 7.0, dtype=torch.float64)
    directions = DIRECTIONS["gaussian"](seed=0, sizes=[6])
    z = directions.values(index=0, step=0, direction=0).double()
    coefficients = {}
    for name, difference in DIFFERENCES.items():
        estimator = difference(smoothing=0.1, num_directions=1)
        walk = CopyingWalk(theta, directions, step=0, points=estimator.points)
        coefficients[name] = compare_along(
            walk, estimator, lambda: (theta[0] + curvature * theta[0] ** 2 / 2).sum().reshape(1)
        )
    assert coefficients["central"].item() == pytest.approx(float(z.sum()))
    assert coefficients["forward"].item() == pytest.approx(float(z.sum() + 0.1 / 2 * (curvature * z**2).sum()))
