"""The fast ways to add directions end at the bits of the plain way, which is NumPy in one thread."""

import contextlib
import time
import tracemalloc
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from hf_dpzo.zo import directions as perturbation
from hf_dpzo.zo.directions import CHUNKS_PER_BLOCK, DIRECTIONS, Rademacher
from hf_dpzo.zo.kernel import MAX_DIRECTIONS_AT_ONCE, add_signs, compile_kernel
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.philox import CHUNK_SIZE, MIN_CHUNKS_PER_THREAD, Stream, Streams


SIZES = [1, 7, 64, 65, 1000, CHUNK_SIZE, CHUNK_SIZE + 3, 2 * CHUNK_SIZE + 77]
MANY = {k: (-1) ** k * 10.0 ** -(k % 7) for k in range(MAX_DIRECTIONS_AT_ONCE + 3)}
WEIGHTS = [
    MANY,
    dict.fromkeys(MANY, 0.0),
    {0: 1e-3},
    {0: 1e-3, 1: -2e-3},
    {k: (-1) ** k * 10.0 ** -(k % 5) for k in range(16)},
    {2: 0.0},
    {},
]


@pytest.fixture
def plain(monkeypatch):
    """A function that adds directions with NumPy alone."""

    def add(
        parameter: torch.Tensor, directions: perturbation.Directions, weights: dict[int, float], *, step: int = 3
    ) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(perturbation, "compile_kernel", lambda: None)
            directions.add_(parameter, index=0, step=step, weights=weights)
        return parameter

    return add


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(perturbation, "MIN_COORDINATES_TO_COMPILE", 0)


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


def test_compiled_sweep_is_used_where_numba_is_installed(monkeypatch):
    pytest.importorskip("numba")
    sizes, kernel = [], compile_kernel()

    def counting(target, words, weights) -> None:
        sizes.append((target.size, words.shape, weights.size))
        kernel(target, words, weights)

    monkeypatch.setattr(perturbation, "compile_kernel", lambda: counting)
    Rademacher(seed=0, sizes=[CHUNK_SIZE + 65]).add_(
        torch.zeros(CHUNK_SIZE + 65), index=0, step=0, weights={0: 1.0, 1: 1.0}
    )
    assert sizes == [(CHUNK_SIZE, (2, CHUNK_SIZE // 64), 2), (65, (2, 2), 2)]


def test_numba_is_not_loaded_for_an_adapter(monkeypatch):
    monkeypatch.setattr(perturbation, "MIN_COORDINATES_TO_COMPILE", 101)
    monkeypatch.setattr(perturbation, "compile_kernel", lambda: pytest.fail("it was asked for"))
    Rademacher(seed=0, sizes=[60, 40]).add_(torch.zeros(60), index=0, step=0, weights={0: 1.0})
    with pytest.raises(pytest.fail.Exception):
        Rademacher(seed=0, sizes=[60, 41]).add_(torch.zeros(60), index=0, step=0, weights={0: 1.0})


def test_python_twin_of_the_compiled_function_agrees_with_numpy(plain):
    size = 130
    parameter, directions = torch.randn(size), Rademacher(seed=5, sizes=[size])
    expected = plain(parameter.clone(), directions, {0: 0.3, 4: -0.7})
    stream = Stream(5)
    words = np.stack([stream.seek((0, 0, k, 3)).random_raw(3) for k in (0, 4)])
    add_signs(parameter.numpy(), words, np.array([0.3, -0.7], dtype=np.float32))
    assert torch.equal(parameter, expected)


def test_masked_and_64_bit_parameters_take_the_plain_way(plain):
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
    size = 11 * MIN_CHUNKS_PER_THREAD // 3 * CHUNK_SIZE + 99
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


def test_cached_words_change_no_bit(monkeypatch):
    """Sweep in any order: over two parameters, along the same direction, others, or many, of this step or another."""
    if compile_kernel() is None:
        monkeypatch.setattr(perturbation, "compile_kernel", lambda: add_signs)
    sizes = [70, CHUNK_SIZE // 64 * 3]
    directions, reference = Rademacher(seed=2, sizes=sizes), Rademacher(seed=2, sizes=sizes)
    draw = np.random.default_rng(0)
    parameters = [torch.randn(size) for size in sizes]
    expected = [parameter.clone() for parameter in parameters]
    for _ in range(60):
        at = {"index": int(draw.integers(2)), "step": int(draw.integers(2))}
        weights = {int(k): float(draw.normal()) for k in draw.permutation(3)[: draw.integers(4)]}
        directions.add_(parameters[at["index"]], **at, weights=weights)
        with monkeypatch.context() as patch:
            patch.setattr(perturbation, "compile_kernel", lambda: None)
            reference.add_(expected[at["index"]], **at, weights=weights)
        assert all(torch.equal(*pair) for pair in zip(parameters, expected, strict=True))


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The directions for which chunks were drawn, one for each chunk."""
    seen, at = [], Stream.seek
    monkeypatch.setattr(perturbation, "compile_kernel", lambda: lambda target, words, weights: None)
    monkeypatch.setattr(Stream, "seek", lambda self, address: seen.append(address[2]) or at(self, address))
    return seen


def test_the_words_of_a_step_with_one_direction_are_drawn_once(drawn):
    directions, parameter = Rademacher(seed=0, sizes=[2 * CHUNK_SIZE]), torch.zeros(2 * CHUNK_SIZE)
    for weights in ({0: 1e-3}, {0: -2e-3}, {0: 1e-3 - 1e-6}):
        directions.add_(parameter, index=0, step=0, weights=weights)
    assert drawn == [0, 0]
    directions.add_(parameter, index=0, step=1, weights={0: 1e-3})
    assert drawn == [0, 0, 0, 0]


def test_a_walk_over_many_directions_draws_each_once_and_all_but_one_again_for_the_update(drawn):
    directions, parameter = Rademacher(seed=0, sizes=[64]), torch.zeros(64)
    for weights in ({0: 1.0}, {0: -1.0, 1: 1.0}, {1: -1.0, 2: 1.0}, {0: 0.1, 1: 0.1, 2: -0.9}):
        directions.add_(parameter, index=0, step=0, weights=weights)
    assert drawn == [0, 1, 2, 0, 1]


def test_words_of_a_failed_sweep_are_not_reused(monkeypatch, plain):
    size = 2 * CHUNK_SIZE
    directions, calls = Rademacher(seed=0, sizes=[size]), []

    def failing(target, words, weights) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add_signs(target[:64], words[:, :1], weights)

    monkeypatch.setattr(perturbation, "compile_kernel", lambda: failing)
    with pytest.raises(KeyboardInterrupt):
        directions.add_(torch.zeros(size), index=0, step=0, weights={0: 1.0})
    parameter, expected = torch.zeros(size), torch.zeros(size)
    directions.add_(parameter, index=0, step=0, weights={0: 1.0})
    plain(expected, Rademacher(seed=0, sizes=[size]), {0: 1.0}, step=0)
    for chunk in (0, CHUNK_SIZE):
        assert torch.equal(parameter[chunk : chunk + 64], expected[chunk : chunk + 64])


def test_threads_divide_all_chunks_and_share_no_stream(threads):
    threads(3)
    seen = []
    Streams(0).run_in_threads(
        lambda stream, chunks: seen.append((id(stream), chunks)), range(3 * MIN_CHUNKS_PER_THREAD + 1)
    )
    assert len({stream for stream, _ in seen}) == 3
    assert sorted(chunk for _, chunks in seen for chunk in chunks) == list(range(3 * MIN_CHUNKS_PER_THREAD + 1))


def test_an_error_in_a_thread_is_raised(threads):
    threads(2)

    def broken(stream: Stream, chunks: range) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        Streams(0).run_in_threads(broken, range(100))


def test_an_error_is_raised_only_after_all_threads_have_ended(threads):
    """A thread that was still running would interfere with the sweep that walks back."""
    threads(2)
    ended = []

    def work(stream: Stream, chunks: range) -> None:
        if chunks.start == 0:
            raise MemoryError
        time.sleep(0.2)
        ended.append(chunks)

    with pytest.raises(MemoryError):
        Streams(0).run_in_threads(work, range(100))
    assert len(ended) == 1


def sweep_and_read_the_end() -> list[float]:
    parameter = np.zeros(
        2 * MIN_CHUNKS_PER_THREAD * CHUNK_SIZE, dtype=np.float32
    )  # torch's own threads do not survive a fork.
    directions = Rademacher(seed=0, sizes=[parameter.size])
    directions.add_(torch.from_numpy(parameter), index=0, step=0, weights={0: 1.0})
    return parameter[-5:].tolist()


def test_a_forked_process_sweeps_with_threads_of_its_own(threads):
    threads(2)
    Streams(0).run_in_threads(
        lambda *_: time.sleep(0.1), range(2 * MIN_CHUNKS_PER_THREAD)
    )  # Both threads exist, and are idle.
    own = sweep_and_read_the_end()
    with get_context("fork").Pool(1) as forked:
        assert forked.apply_async(sweep_and_read_the_end).get(timeout=20) == own


@pytest.mark.parametrize("mask", [None, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_pieces_for_another_device_add_up_to_the_same_sum(kind, weights, mask, plain):
    """Run the branch for other devices on this one: it sends blocks of chunks, and signs as bits."""
    size = 2 * CHUNK_SIZE + 77
    mask = None if mask is None else Mask([np.arange(size) % mask == 0])
    directions, parameter = DIRECTIONS[kind](seed=4, sizes=[size], mask=mask), torch.randn(size)
    expected = plain(parameter.clone(), directions, weights)
    blocks = [range(2), range(2, 3)]
    with contextlib.nullcontext() if kind != "rademacher" else directions._words.sweep(0, 3, weights):
        pieces = [directions._combine_on_device(parameter.device, block, (0, 3), weights) for block in blocks]
    assert [len(piece) for piece in pieces] == [2 * CHUNK_SIZE, 77]
    assert torch.equal(parameter + torch.cat(pieces), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_a_gpu_ends_at_the_bits_of_the_cpu(kind, plain):
    size = (CHUNKS_PER_BLOCK + 1) * CHUNK_SIZE + 77
    directions, parameter = DIRECTIONS[kind](seed=4, sizes=[size]), torch.randn(size)
    expected, moved = plain(parameter.clone(), directions, {0: 1e-3, 1: 2e-3}), parameter.cuda()
    directions.add_(moved, index=0, step=3, weights={0: 1e-3, 1: 2e-3})
    assert torch.equal(moved.cpu(), expected)


@pytest.mark.parametrize("first", [0, 1, MAX_DIRECTIONS_AT_ONCE + 1])
@pytest.mark.parametrize("count", [2, MAX_DIRECTIONS_AT_ONCE + 2])
def test_words_that_are_kept_from_the_sweep_before_change_no_bit(plain, first, count):
    """The first sweep keeps the words of one direction, and the second one needs them at any place."""
    pytest.importorskip("numba")
    size = CHUNK_SIZE + 3
    parameter, directions = torch.randn(size), Rademacher(seed=5, sizes=[size])
    weights = {k: (-1) ** k * 10.0 ** -(k % 7) for k in range(count)}
    expected = plain(plain(parameter.clone(), directions, {first: 0.5}), Rademacher(seed=5, sizes=[size]), weights)
    fresh = Rademacher(seed=5, sizes=[size])
    for sweep in ({first: 0.5}, weights):
        fresh.add_(parameter, index=0, step=3, weights=sweep)
    assert torch.equal(parameter, expected)


@pytest.mark.parametrize("on_device", [False, True])
def test_many_directions_take_no_more_memory_than_few(on_device):
    """A stranger's log may ask for 65536 of them in each step."""
    pytest.importorskip("numba")
    directions, parameter = Rademacher(seed=0, sizes=[4 * CHUNK_SIZE]), torch.zeros(4 * CHUNK_SIZE)
    peaks = []
    for count in (16, 4096):
        weights = dict.fromkeys(range(count), 1e-3)
        directions.add_(parameter, index=0, step=0, weights=weights)  # Whatever is made once is there.
        tracemalloc.start()
        if on_device:
            with directions._words.sweep(0, 1, weights):
                directions._combine_on_device(torch.device("cpu"), range(4), (0, 1), weights)
        else:
            directions.add_(parameter, index=0, step=1, weights=weights)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + (1 << 20)
