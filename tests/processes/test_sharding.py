"""Models of which each process holds a part, through torch's own API: the bits are those of the whole model."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_dpzo.distributed.sharding import local_part
from hf_dpzo.methods import METHODS
from hf_dpzo.step.descent import Descent
from hf_dpzo.step.fsdp import GatherOrder
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.philox import CHUNK

from support.models import classifier
from support.processes import in_each


STEPS = 3


def joined(make_args) -> None:
    """Join the group of processes."""
    make_args()


@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
@pytest.mark.parametrize("size", [2, 3])
def test_parts_are_moved_by_their_part_of_a_direction(kind, size, make_args):
    shape = (11, 2 * CHUNK // 10)
    start, weights = torch.randn(shape), {0: 0.25, 3: -2.0}
    directions = DIRECTIONS[kind](seed=3, sizes=[7, start.numel()])
    whole = start.clone()
    directions.add_(whole, index=1, step=2, weights=weights)

    def work(rank: int) -> torch.Tensor:
        joined(make_args)
        mesh = init_device_mesh("cpu", (size,))
        part = distribute_tensor(start, mesh, [Shard(0)])
        directions.add_(part, index=1, step=2, weights=weights)
        return part.full_tensor()

    assert all(torch.equal(found, whole) for found in in_each(size, work))


def test_a_part_that_is_not_consecutive_is_refused(make_args):
    def work(rank: int) -> str:
        joined(make_args)
        mesh = init_device_mesh("cpu", (2,))
        copied = distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()])
        assert local_part(copied)[0].shape == (4, 4)
        with pytest.raises(ValueError, match="split it along its first dimension") as error:
            local_part(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))
        return str(error.value)

    assert len(set(in_each(2, work))) == 1


def descended(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Some steps on one batch, whose losses follow from the walk, by the parts that train models."""
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 4} if name != "mezo" else {}
    directions = {"num_directions": 3} if name == "aggzo" else {}
    method = METHODS[name](smoothing=1e-2, **settings, **directions)
    ids = torch.randint(4, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizer = ZOOptimizer(model.parameters(), directions=DIRECTIONS["rademacher"], seed=5, lr=1e-2)
    optimizer.begin_stage()
    descent = Descent(model=model, optimizer=optimizer, method=method, planned_steps=STEPS)
    gathers = GatherOrder(model)

    def losses() -> torch.Tensor:
        with gathers.one_pass():
            return model(input_ids=ids).logits[:, 0].float()

    for step in range(STEPS):
        with torch.no_grad(), descent.walk(step) as walk:
            found = descent.estimator(step).coefficients(torch.stack([losses().double() for _ in walk], dim=1))
        optimizer.receive(step=step, coefficients=found.mean(dim=0).tolist())
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["mezo", "aggzo"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_model_ends_at_the_bits_of_the_whole_one(name, size, make_args):
    """Also the root's own parameters, which FSDP keeps whole after a forward pass."""
    model = classifier()
    whole = {n: p.detach() for n, p in descended(classifier_like(model), name).named_parameters()}
    assert any(not torch.equal(p, whole[n]) for n, p in model.named_parameters())

    def work(rank: int) -> list[str]:
        joined(make_args)
        mesh = init_device_mesh("cpu", (size,))
        sharded = classifier_like(model)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        held = sum(p.to_local().numel() for p in sharded.parameters())
        assert held < 0.75 * sum(p.numel() for p in sharded.parameters())
        descended(sharded, name)
        for module in sharded.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return [n for n, p in sharded.named_parameters() if not torch.equal(p.full_tensor(), whole[n])]

    assert in_each(size, work) == [[]] * size


def classifier_like(model: torch.nn.Module) -> torch.nn.Module:
    made = classifier()
    made.load_state_dict(model.state_dict())
    return made
