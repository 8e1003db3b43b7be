"""Public directions: the same for any slice, order and chunk, correctly distributed, and added without a copy."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dpzo.zo.directions import DIRECTIONS, Gaussian, Rademacher, Sphere
from hf_dpzo.zo.philox import CHUNK_SIZE, DOMAIN


KINDS = sorted(DIRECTIONS)


def dense(kind, sizes, seed, step, direction):
    """Return the whole direction of each parameter, each requested at once."""
    directions = DIRECTIONS[kind](seed=seed, sizes=sizes)
    return [directions.values(index=i, step=step, direction=direction) for i in range(len(sizes))]


def philox_signs(seed, index, step, direction, size):
    """Return the signs from the plain twin: the bits of Philox, chunk by chunk, low bit first; 1 means minus."""
    signs = []
    for chunk in range(0, size, CHUNK_SIZE):
        key = np.array([seed, DOMAIN], dtype=np.uint64)
        counter = np.array([(chunk // CHUNK_SIZE) << 32, index, direction, step], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(CHUNK_SIZE // 64)
        signs += [1.0 - 2.0 * ((int(word) >> bit) & 1) for word in words.tolist() for bit in range(64)]
    return torch.tensor(signs[:size])


@pytest.mark.parametrize("size", [1, 7, 64, 1000, CHUNK_SIZE, CHUNK_SIZE + 3])
def test_signs_are_the_bits_of_philox(size):
    values = Rademacher(seed=5, sizes=[9, size]).values(index=1, step=3, direction=2)
    assert torch.equal(values, philox_signs(5, 1, 3, 2, size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 10), (17, 61), (CHUNK_SIZE - 5, CHUNK_SIZE + 5), (CHUNK_SIZE, 2 * CHUNK_SIZE + 1)]
)
def test_any_slice_is_a_slice_of_the_whole(kind, start, stop):
    size = 2 * CHUNK_SIZE + 100
    directions = DIRECTIONS[kind](seed=1, sizes=[size])
    whole = directions.values(index=0, step=0, direction=0)
    assert torch.equal(directions.values(index=0, step=0, direction=0, start=start, stop=stop), whole[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_directions_do_not_depend_on_the_order_of_requests(kind):
    sizes = [300, 20]
    first = [dense(kind, sizes, 0, step, k) for step in range(2) for k in range(2)]
    backwards = [dense(kind, sizes, 0, step, k) for step in (1, 0) for k in (1, 0)][::-1]
    assert all(torch.equal(a, b) for pair in zip(first, backwards, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_address_changes_the_direction(kind):
    base = DIRECTIONS[kind](seed=0, sizes=[64, 64])
    values = base.values(index=0, step=0, direction=0)
    others = [
        base.values(index=1, step=0, direction=0),
        base.values(index=0, step=1, direction=0),
        base.values(index=0, step=0, direction=1),
        DIRECTIONS[kind](seed=1, sizes=[64, 64]).values(index=0, step=0, direction=0),
    ]
    assert not any(torch.equal(values, other) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_adding_agrees_with_the_dense_direction(kind):
    sizes = [(3, 5), (CHUNK_SIZE + 7,), ()]
    parameters = [torch.randn(size) for size in sizes]
    before = [parameter.clone() for parameter in parameters]
    directions = DIRECTIONS[kind](seed=0, sizes=[parameter.numel() for parameter in parameters])
    for index, parameter in enumerate(parameters):
        directions.add_(parameter, index=index, step=4, weights={0: 0.25, 3: -2.0})
    for index, (old, new) in enumerate(zip(before, parameters, strict=True)):
        z = [directions.values(index=index, step=4, direction=k).view(old.shape) for k in (0, 3)]
        torch.testing.assert_close(new, old + 0.25 * z[0] - 2.0 * z[1], rtol=1e-6, atol=1e-6)


def test_adding_signs_rounds_once():
    """A log replayed on another device, where addition is correctly rounded too, therefore ends at the same bits."""
    parameter = torch.randn(1000)
    expected = parameter + philox_signs(0, 0, 0, 0, 1000) * np.float32(1e-3)
    Rademacher(seed=0, sizes=[1000]).add_(parameter, index=0, step=0, weights={0: 1e-3})
    assert torch.equal(parameter, expected)


def test_empty_weights_leave_the_parameter_unchanged():
    parameter = torch.ones(5)
    Rademacher(seed=0, sizes=[5]).add_(parameter, index=0, step=0, weights={})
    assert torch.equal(parameter, torch.ones(5))


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_are_left_unchanged(kind):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    dense(kind, [1000], 0, 0, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_signs_are_fair_and_independent():
    signs = dense("rademacher", [200_000], 0, 0, 0)[0].numpy()
    other = dense("rademacher", [200_000], 0, 0, 1)[0].numpy()
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / np.sqrt(200_000)
    assert abs((signs * other).mean()) < 5 / np.sqrt(200_000)
    assert abs((signs[1:] * signs[:-1]).mean()) < 5 / np.sqrt(200_000)


def test_gaussian_directions_are_standard_normal():
    values = dense("gaussian", [100_000], 0, 0, 0)[0].numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert stats.kstest(values, "norm", args=(0, 3 / 2)).pvalue < 1e-9


def test_sphere_has_radius_root_d_over_all_parameters():
    sizes = [50, CHUNK_SIZE + 11, 3]
    for step in range(3):
        squares = sum(float(z.double().square().sum()) for z in dense("sphere", sizes, 0, step, 0))
        assert squares == pytest.approx(sum(sizes), rel=1e-6)


def test_sphere_is_the_rescaled_gaussian_direction():
    sizes = [40, 60]
    gaussian = torch.cat([Gaussian(seed=0, sizes=sizes).values(index=i, step=0, direction=0) for i in range(2)])
    sphere = torch.cat([Sphere(seed=0, sizes=sizes).values(index=i, step=0, direction=0) for i in range(2)])
    torch.testing.assert_close(sphere, gaussian * 10 / gaussian.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_as_large_as_the_parameter_is_allocated(kind):
    """NumPy's buffers are seen by tracemalloc, and torch's by its profiler."""
    parameter = torch.zeros(64 * CHUNK_SIZE)
    directions = DIRECTIONS[kind](seed=0, sizes=[parameter.numel()])
    address = parameter.data_ptr()
    with torch.profiler.profile(profile_memory=True) as profile:
        tracemalloc.start()
        directions.add_(parameter, index=0, step=0, weights={0: 1.0})
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    largest = max((event.self_cpu_memory_usage / max(event.count, 1) for event in profile.key_averages()), default=0)
    assert max(numpy_peak, largest) < parameter.numel() * 4 / 8
    assert parameter.data_ptr() == address


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_invalid_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed="):
        Rademacher(seed=seed, sizes=[1])
