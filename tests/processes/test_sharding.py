"""Models of which each process holds a part, through torch's own API: the bits are those of the whole model."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_dpzo.distributed.sharding import get_local_shard
from hf_dpzo.methods import METHODS
from hf_dpzo.step.descent import Descent
from hf_dpzo.step.fsdp import GatherOrder
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.philox import CHUNK_SIZE

from support.models import classifier
from support.processes import Here
from support.runs import short_args
from support.sweeps import slow


STEPS = 3
SHAPE = (11, 2 * CHUNK_SIZE // 10)


def moved(kind: str) -> torch.Tensor:
    """A tensor that was moved along a direction."""
    return along(kind, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def along(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    directions = DIRECTIONS[kind](seed=3, sizes=[7, tensor.numel()])
    directions.add_(tensor, index=1, step=2, weights={0: 0.25, 3: -2.0})
    return tensor


def moved_in_parts(here: Here, kind: str, folder: Path) -> torch.Tensor:
    short_args(folder)  # Which joins the group of processes.
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return along(kind, distribute_tensor(start, init_device_mesh("cpu", (here.size,)), [Shard(0)])).full_tensor()


@pytest.mark.parametrize("size", [2, *slow(3)])
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_parts_are_moved_by_their_part_of_a_direction(kind, size, launched, tmp_path):
    assert all(torch.equal(found, moved(kind)) for found in launched[size].each(moved_in_parts, kind, tmp_path))


def refused(here: Here, folder: Path) -> str:
    short_args(folder)
    mesh = init_device_mesh("cpu", (2,))
    copied = distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()])
    assert get_local_shard(copied)[0].shape == (4, 4)
    with pytest.raises(ValueError, match="split it along its first dimension") as error:
        get_local_shard(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))
    return str(error.value)


def test_a_part_that_is_not_consecutive_is_refused(pair, tmp_path):
    assert len(set(pair.each(refused, tmp_path))) == 1


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
        with gathers.complete_pass():
            return model(input_ids=ids).logits[:, 0].float()

    for step in range(STEPS):
        with torch.no_grad(), descent.walk(step) as walk:
            found = descent.estimator(step).coefficients(torch.stack([losses().double() for _ in walk], dim=1))
        optimizer.receive(step=step, coefficients=found.mean(dim=0).tolist())
        optimizer.step()
    return model


def others_than_the_whole_one(here: Here, name: str, folder: Path) -> list[str]:
    """The parameters of a model in parts that end elsewhere than those of the whole one."""
    short_args(folder)
    mesh = init_device_mesh("cpu", (here.size,))
    torch.manual_seed(0)
    whole = {n: p.detach() for n, p in descended(classifier(), name).named_parameters()}
    torch.manual_seed(0)
    sharded = classifier()
    assert any(not torch.equal(p, whole[n]) for n, p in sharded.named_parameters())
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


@pytest.mark.parametrize("size", [2, *slow(3)])
@pytest.mark.parametrize("name", ["mezo", "aggzo"])
def test_a_sharded_model_ends_at_the_bits_of_the_whole_one(name, size, launched, tmp_path):
    """Also the root's own parameters, which FSDP keeps whole after a forward pass."""
    assert launched[size].each(others_than_the_whole_one, name, tmp_path) == [[]] * size
