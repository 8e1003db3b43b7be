"""The checksums that sweeps take while they write, in place of reading all parameters once more."""

import pytest
import torch

from hf_dpzo.distributed.checksums import checksum
from hf_dpzo.models.seal import Seal
from hf_dpzo.models.state import ModelState
from hf_dpzo.models.write_guard import ModelChangedError
from hf_dpzo.zo import directions as perturbation
from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.kernel import MAX_DIRECTIONS_AT_ONCE
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.philox import CHUNK_SIZE, MIN_CHUNKS_PER_THREAD
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk, ProbePoint


pytest.importorskip("numba")
POINTS = [ProbePoint(direction=0, position=1e-3), ProbePoint(direction=0, position=-1e-3)]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(perturbation, "MIN_COORDINATES_TO_COMPILE", 0)


def swept(*sizes, weights=None, kind=Rademacher):
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    directions = kind(seed=3, sizes=sizes)
    for index, parameter in enumerate(parameters):
        directions.add_(parameter, index=index, step=0, weights={0: 1e-3} if weights is None else weights)
    return parameters, directions


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 3, MAX_DIRECTIONS_AT_ONCE + 1])
@pytest.mark.parametrize("size", [1, 4096, CHUNK_SIZE + 3, 2 * MIN_CHUNKS_PER_THREAD * CHUNK_SIZE + 5])
def test_a_sweep_takes_the_checksum_of_what_it_leaves(size, count, threads):
    if count > 3 and size > CHUNK_SIZE + 3:
        pytest.skip("many directions of many coordinates take long, and add nothing")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (parameter,), directions = swept(size, weights=dict.fromkeys(range(count), 1e-3))
    finally:
        torch.set_num_threads(before)
    assert directions.swept.find([parameter]) == {parameter: checksum([parameter])}


def test_nothing_is_known_after_a_write_that_torch_counts_or_of_another_tensor():
    (one, two), directions = swept(5, 7)
    assert set(directions.swept.find([one, two])) == {one, two}
    with torch.no_grad():
        two.mul_(1)
    assert set(directions.swept.find([one, two])) == {one}
    assert not directions.swept.find([torch.nn.Parameter(one.detach().clone())])


@pytest.mark.parametrize("how", ["no weights", "16 bits", "gaussian", "error"])
def test_nothing_is_known_where_a_sweep_took_no_sums(how, monkeypatch):
    (parameter,), directions = swept(70)
    if how == "gaussian":
        (parameter,), directions = swept(70, kind=perturbation.Gaussian)
    elif how == "16 bits":
        parameter = torch.nn.Parameter(parameter.detach().half())
        directions.add_(parameter, index=0, step=0, weights={0: 1e-3})
    elif how == "error":
        monkeypatch.setattr(directions._streams, "run_in_threads", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            directions.add_(parameter, index=0, step=0, weights={0: 1e-3})
    else:
        directions.add_(parameter, index=0, step=0, weights={})
    assert not directions.swept.find([parameter])


def write_by_numpy(parameter):
    parameter.detach().numpy()[0] += 1


@pytest.mark.parametrize("write", [write_by_numpy, lambda parameter: parameter.data.add_(1)])
def test_a_write_after_a_sweep_is_found_although_the_parameter_was_not_read_again(write):
    model = torch.nn.Linear(3, 70)
    parameters = list(model.parameters())
    directions = Rademacher(seed=0, sizes=[p.numel() for p in parameters])
    state = ModelState(model, moving=parameters)
    with AddingWalk(parameters, directions, step=0, points=POINTS) as walk:
        for stop in walk:
            assert set(stop.checksums) == set(parameters)
            with state.held_still(stop.checksums):
                pass
            with pytest.raises(ModelChangedError, match="weight"), state.held_still(stop.checksums):
                write(parameters[0])


def test_a_seal_with_known_checksums_breaks_at_a_write_that_came_in_between():
    (parameter,), directions = swept(70)
    seal = Seal(lambda: [parameter])
    seal.apply(directions.swept.find([parameter]))
    assert not seal.is_broken()
    known = directions.swept.find([parameter])
    write_by_numpy(parameter)
    seal.apply(known)
    assert seal.is_broken()


def test_a_copying_walk_ends_with_nothing_known():
    """It copies theta back, which is not what the last sweep left."""
    parameter = torch.nn.Parameter(torch.randn(70))
    optimizer = ZOOptimizer([parameter], directions=Rademacher, seed=0, lr=0.1)
    with CopyingWalk([parameter], optimizer.directions, step=0, points=POINTS) as walk:
        for stop in walk:
            assert stop.checksums == {parameter: checksum([parameter])}
    assert not optimizer.swept_checksums()
