"""The fast ways to add directions: their bits are those of the plain way, which NumPy goes in one thread."""

import numpy as np
import pytest
import torch

from hf_dpzo import perturbation
from hf_dpzo.kernel import add_signs, compiled
from hf_dpzo.mask import Mask
from hf_dpzo.perturbation import BLOCK, DIRECTIONS, Rademacher
from hf_dpzo.stream import CHUNK, CHUNKS_WORTH_A_THREAD, Stream, Streams


SIZES = [1, 7, 64, 65, 1000, CHUNK, CHUNK + 3, 2 * CHUNK + 77]
WEIGHTS = [{0: 1e-3}, {0: 1e-3, 1: -2e-3}, {k: (-1) ** k * 10.0 ** -(k % 5) for k in range(16)}, {2: 0.0}, {}]


@pytest.fixture
def plain(monkeypatch):
    """Adds by NumPy alone."""

    def add(parameter: torch.Tensor, directions: perturbation.Directions, weights: dict[int, float]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(perturbation, "compiled", lambda: None)
            directions.add_(parameter, index=0, step=3, weights=weights)
        return parameter

    return add


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", SIZES)
def test_compiled_sweep_ends_at_the_bits_of_numpy(size, weights, plain):
    pytest.importorskip("numba")
    parameter, directions = torch.randn(size), Rademacher(seed=5, sizes=[size])
    expected = plain(parameter.clone(), directions, weights)
    directions.add_(parameter, index=0, step=3, weights=weights)
    assert torch.equal(parameter, expected)


def test_compiled_sweep_is_taken_where_numba_is_installed(monkeypatch):
    pytest.importorskip("numba")
    sizes, kernel = [], compiled()

    def counting(target, words, weights) -> None:
        sizes.append((target.size, words.shape, weights.size))
        kernel(target, words, weights)

    monkeypatch.setattr(perturbation, "compiled", lambda: counting)
    Rademacher(seed=0, sizes=[CHUNK + 65]).add_(torch.zeros(CHUNK + 65), index=0, step=0, weights={0: 1.0, 1: 1.0})
    assert sizes == [(CHUNK, (2, CHUNK // 64), 2), (65, (2, 2), 2)]


def test_python_twin_of_the_compiled_function_agrees_with_numpy(plain):
    size = 130
    parameter, directions = torch.randn(size), Rademacher(seed=5, sizes=[size])
    expected = plain(parameter.clone(), directions, {0: 0.3, 4: -0.7})
    stream = Stream(5)
    words = np.stack([stream.at((0, 0, k, 3)).random_raw(3) for k in (0, 4)])
    add_signs(parameter.numpy(), words, np.array([0.3, -0.7], dtype=np.float32))
    assert torch.equal(parameter, expected)


def test_masked_and_64_bit_parameters_go_the_plain_way(plain):
    mask = Mask([np.arange(100) % 3 == 0])
    for directions, dtype in (
        (Rademacher(seed=1, sizes=[100], mask=mask), torch.float32),
        (Rademacher(seed=1, sizes=[100]), torch.float64),
    ):
        parameter = torch.randn(100, dtype=dtype)
        expected = plain(parameter.clone(), directions, {0: 0.5})
        directions.add_(parameter, index=0, step=3, weights={0: 0.5})
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_number_of_threads_changes_no_bit(kind, count, fast, plain, threads):
    size = 11 * CHUNKS_WORTH_A_THREAD // 3 * CHUNK + 99
    start, weights = torch.randn(size), {0: 1e-3, 7: 0.25}
    ends = []
    for number in (1, count):
        threads(number)
        directions, parameter = DIRECTIONS[kind](seed=2, sizes=[size]), start.clone()
        if fast:
            directions.add_(parameter, index=0, step=3, weights=weights)
        else:
            plain(parameter, directions, weights)
        ends.append(parameter)
    assert torch.equal(*ends)


def test_threads_share_all_chunks_out_and_use_no_stream_twice(threads):
    threads(3)
    seen = []
    Streams(0).share(lambda stream, chunks: seen.append((id(stream), chunks)), range(3 * CHUNKS_WORTH_A_THREAD + 1))
    assert len({stream for stream, _ in seen}) == 3
    assert sorted(chunk for _, chunks in seen for chunk in chunks) == list(range(3 * CHUNKS_WORTH_A_THREAD + 1))


def test_error_of_a_thread_is_raised(threads):
    threads(2)

    def broken(stream: Stream, chunks: range) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        Streams(0).share(broken, range(100))


@pytest.mark.parametrize("mask", [None, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_what_is_sent_to_another_device_is_the_same_sum(kind, weights, mask, plain):
    """The branch for other devices, on this one: blocks of chunks, of which signs cross as bits."""
    size = 2 * CHUNK + 77
    mask = None if mask is None else Mask([np.arange(size) % mask == 0])
    directions, parameter = DIRECTIONS[kind](seed=4, sizes=[size], mask=mask), torch.randn(size)
    expected = plain(parameter.clone(), directions, weights)
    pieces = [directions._on_device(parameter.device, block, (0, 3), weights) for block in (range(2), range(2, 3))]
    assert [len(piece) for piece in pieces] == [2 * CHUNK, 77]
    assert torch.equal(parameter + torch.cat(pieces), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_on_a_gpu_the_bits_are_those_of_the_cpu(kind, plain):
    size = (BLOCK + 1) * CHUNK + 77
    directions, parameter = DIRECTIONS[kind](seed=4, sizes=[size]), torch.randn(size)
    expected, moved = plain(parameter.clone(), directions, {0: 1e-3, 1: 2e-3}), parameter.cuda()
    directions.add_(moved, index=0, step=3, weights={0: 1e-3, 1: 2e-3})
    assert torch.equal(moved.cpu(), expected)
