"""The update, compared with the dense formula."""

import contextlib
import copy
import pickle

import pytest
import torch

from hf_dpzo.zo.constraints import QuadraticAnchor
from hf_dpzo.zo.directions import DIRECTIONS, Rademacher
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.updates import Adam
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk, ProbePoint, StackingWalk


def make(parameters, **settings) -> ZOOptimizer:
    optimizer = ZOOptimizer(parameters, **{"directions": Rademacher, "seed": 0, "lr": 0.1, **settings})
    optimizer.begin_stage()
    return optimizer


@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_step_moves_along_the_weighted_directions(kind):
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    before = [p.detach().clone() for p in parameters]
    optimizer = make(parameters, directions=DIRECTIONS[kind])
    optimizer.receive(step=7, coefficients=[2.0, -1.0])
    optimizer.step()
    for index, (old, new) in enumerate(zip(before, parameters, strict=True)):
        z = [optimizer.directions.values(index=index, step=7, direction=k).view(old.shape) for k in (0, 1)]
        torch.testing.assert_close(new.detach(), old - 0.1 * (2 * z[0] - z[1]), rtol=1e-6, atol=1e-6)


def test_groups_have_their_own_rate_and_decay():
    decayed, plain = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = make([{"params": [decayed], "weight_decay": 0.5}, {"params": [plain], "lr": 0.2}])
    optimizer.receive(step=0, coefficients=[1.0])
    optimizer.step()
    z = [optimizer.directions.values(index=index, step=0, direction=0) for index in (0, 1)]
    torch.testing.assert_close(decayed.detach(), 1 - 0.1 * 0.5 - 0.1 * z[0])
    torch.testing.assert_close(plain.detach(), 1 - 0.2 * z[1])


def test_replaying_the_same_releases_ends_at_the_same_bits():
    def run() -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        optimizer = make([parameter])
        for step in range(5):
            optimizer.receive(step=step, coefficients=[0.3 * step, -1.7])
            optimizer.step()
        return parameter.detach()

    assert torch.equal(run(), run())


def test_scheduler_changes_the_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = make([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    moves = []
    for _ in range(3):
        before = parameter.item()
        optimizer.receive(step=0, coefficients=[1.0])
        optimizer.step()
        scheduler.step()
        moves.append(abs(parameter.item() - before))
    assert moves == pytest.approx([1.0, 0.5, 0.25])


def test_step_without_a_release_is_refused():
    with pytest.raises(RuntimeError, match="nothing was received"):
        make([torch.nn.Parameter(torch.zeros(1))]).step()


def test_a_release_is_applied_once():
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    optimizer.receive(step=0, coefficients=[1.0])
    with pytest.raises(RuntimeError, match="never applied"):
        optimizer.receive(step=1, coefficients=[1.0])
    optimizer.step()
    with pytest.raises(RuntimeError, match="nothing was received"):
        optimizer.step()


def test_parameters_exchanged_in_the_groups_are_updated():
    """accelerate exchanges the tensors in the groups for sharded ones."""
    old, new = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = make([old])
    optimizer.param_groups[0]["params"][0] = new
    optimizer.receive(step=0, coefficients=[1.0])
    optimizer.step()
    assert new.abs().sum() > 0
    assert old.abs().sum() == 0


def test_no_state_is_kept():
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.state_dict()["state"] == {}


def displaced(parameters, *, at=0.25, step=3, direction=1, **settings) -> ZOOptimizer:
    """Return an optimizer whose parameters a walk has left at a probe point."""
    optimizer = make(parameters, **settings)
    points = [ProbePoint(direction=direction, position=at)]
    walk = AddingWalk(parameters, optimizer.directions, step=step, points=points)
    with optimizer.follow(walk, step=step):
        assert len(list(walk)) == 1
    return optimizer


@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_walking_back_and_the_update_are_one_sum_rounded_once(kind):
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    before = [p.detach().clone() for p in parameters]
    optimizer = displaced(parameters, directions=DIRECTIONS[kind])
    displaced_values = [p.detach().clone() for p in parameters]
    optimizer.receive(step=3, coefficients=[2.0, -1.0])
    optimizer.step()
    for index, (old, expected, new) in enumerate(zip(before, displaced_values, parameters, strict=True)):
        z = [optimizer.directions.values(index=index, step=3, direction=k).view(old.shape) for k in (0, 1)]
        torch.testing.assert_close(new.detach(), old - 0.1 * (2 * z[0] - z[1]), rtol=1e-6, atol=1e-6)
        optimizer.directions.add_(expected, index=index, step=3, weights={0: -0.1 * 2.0, 1: 0.1 - 0.25})
        assert torch.equal(new.detach(), expected)
    optimizer.settle()  # Nothing is left to do.
    assert all(torch.equal(new.detach(), expected) for expected, new in zip(displaced_values, parameters, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"weight_decay": 0.5}, {"constraint": QuadraticAnchor(strength=0.5)}, {"update": Adam()}],
    ids=["decay", "anchor", "adam"],
)
def test_decay_anchors_and_adam_see_theta_instead_of_a_probe_point(settings):
    ends = []
    for walked in (False, True):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = displaced([parameter], **settings) if walked else make([parameter], **settings)
        optimizer.receive(step=3, coefficients=[1.0, 1.0])
        optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_a_walk_of_another_step_is_walked_back():
    parameter = torch.nn.Parameter(torch.zeros(9))
    optimizer = displaced([parameter], step=3)
    optimizer.receive(step=4, coefficients=[0.0, 2.0])
    optimizer.step()
    z = optimizer.directions.values(index=0, step=4, direction=1)
    torch.testing.assert_close(parameter.detach(), -0.2 * z, rtol=0, atol=1e-6)


def test_settling_walks_back_once():
    parameter = torch.nn.Parameter(torch.randn(9))
    before = parameter.detach().clone()
    optimizer = displaced([parameter])
    assert not torch.allclose(parameter, before)
    torch.testing.assert_close(optimizer.read_settled(0, torch.tensor([5, 2])), before[[5, 2]], rtol=0, atol=1e-6)
    for _ in range(2):
        optimizer.settle()
        torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=1e-6)


def test_finishing_applies_what_was_received_or_walks_back():
    for received in (True, False):
        parameter = torch.nn.Parameter(torch.randn(9))
        before = parameter.detach().clone()
        optimizer = displaced([parameter])
        if received:
            optimizer.receive(step=3, coefficients=[0.0, 2.0])
        optimizer.finish()
        z = optimizer.directions.values(index=0, step=3, direction=1)
        torch.testing.assert_close(parameter.detach(), before - received * 0.2 * z, rtol=0, atol=1e-6)
        assert optimizer.is_midstep != received
        assert not optimizer.pending_coefficients


def walks(parameters, optimizer):
    points = [ProbePoint(direction=0, position=side) for side in (0.25, -0.25)]
    given = {"step": 3, "points": points}
    return {
        "adding": AddingWalk(parameters, optimizer.directions, **given),
        "copying": CopyingWalk(parameters, optimizer.directions, **given),
        "stacking": StackingWalk(parameters, optimizer.directions, **given, points_per_stop=2),
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["adding", "copying", "stacking"])
def test_an_adding_walk_and_one_that_fails_count_as_in_the_middle_of_a_step(name, fails):
    parameter = torch.nn.Parameter(torch.randn(9))
    before, optimizer = parameter.detach().clone(), make([parameter])
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():  # noqa: SIM117
        with optimizer.follow(walks([parameter], optimizer)[name], step=3) as walk:
            for _ in walk:
                assert optimizer.is_midstep
                if fails:
                    raise KeyboardInterrupt
    assert optimizer.is_midstep == (fails or name == "adding")
    optimizer.settle()
    torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=1e-6 if name == "adding" else 0)


def test_a_walk_that_fails_is_walked_back_at_once():
    parameter = torch.nn.Parameter(torch.randn(9))
    before, optimizer = parameter.detach().clone(), make([parameter])
    walk = walks([parameter], optimizer)["adding"]
    with pytest.raises(ValueError, match="here"), optimizer.follow(walk, step=3):
        next(iter(walk))
        raise ValueError("here")
    torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=1e-6)


def test_finishing_takes_no_step_at_a_rate_other_than_the_logged_one():
    parameter = torch.nn.Parameter(torch.randn(9))
    before = parameter.detach().clone()
    optimizer = displaced([parameter])
    optimizer.receive(step=3, coefficients=[0.0, 2.0])
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.finish()
    torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_continues_like_the_optimizer_itself(copied):
    optimizer = displaced([torch.nn.Parameter(torch.linspace(-1, 1, 9))])
    optimizer.receive(step=3, coefficients=[1.0, 2.0])
    twin = copied(optimizer)
    for each in (optimizer, twin):
        each.step()
    assert torch.equal(*[each.parameters()[0] for each in (optimizer, twin)])
