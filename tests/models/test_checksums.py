"""The checksum of tensors: what it notices, and that its fast form agrees with its plain one."""

import numpy as np
import pytest
import torch

from hf_dpzo.distributed import checksums
from hf_dpzo.distributed.checksums import BYTES_PER_SUM, checksum, choose_kernel, compile_kernel, sum_words


NUMBERS = BYTES_PER_SUM // 4
SIZES = [0, 1, 5, NUMBERS - 1, NUMBERS, NUMBERS + 1, 70 * NUMBERS + 3]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.bool])
@pytest.mark.parametrize("size", SIZES)
def test_compiled_sums_agree_with_those_of_torch(size, dtype, count):
    pytest.importorskip("numba")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        tensor = torch.randn(size).to(dtype)
        plain = checksum([tensor])
        assert checksum([tensor], kernel=compile_kernel()) == plain
        assert checksum([torch.cat([tensor[:0], torch.zeros(1, dtype=dtype), tensor])[1:]]) == plain  # Moved in memory.
    finally:
        torch.set_num_threads(before)


def test_python_twin_of_the_compiled_sums_agrees():
    words = np.random.default_rng(0).integers(-(2**63), 2**63, 2048)
    plain, sums = np.zeros(1, dtype=np.int64), torch.zeros(1, dtype=torch.int64)
    with np.errstate(over="ignore"):
        sum_words(words, checksums._FACTORS, plain)
    checksums._sum_by_torch(torch.from_numpy(words).view(torch.uint8), sums)
    assert plain[0] == sums[0]


CHANGES = {
    "one sign": lambda x: x[7:8].neg_(),
    "two signs of upper halves": lambda x: x[1:5:2].neg_(),
    "all signs of upper halves": lambda x: x[1::2].neg_(),
    "all signs of lower halves": lambda x: x[::2].neg_(),
    "all signs": lambda x: x.neg_(),
    "signs in different sums": lambda x: x[:: NUMBERS - 1].neg_(),
    "upper halves doubled": lambda x: x[1::2].mul_(2),
    "two neighbours swapped": lambda x: x[:2].copy_(x[:2].flip(0).clone()),
    "two sums swapped": lambda x: x[: 2 * NUMBERS].copy_(x[: 2 * NUMBERS].roll(NUMBERS).clone()),
    "the last number": lambda x: x[-1:].add_(1e-3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_bits_changes_the_checksum(name):
    tensor = torch.randn(4 * NUMBERS + 5)
    before = checksum([tensor])
    CHANGES[name](tensor)
    assert checksum([tensor]) != before


def test_the_order_and_the_lengths_of_tensors_count():
    one, two = torch.ones(3), torch.zeros(3)
    assert len({checksum([one, two]), checksum([two, one]), checksum([torch.cat([one, two])]), checksum([one])}) == 4


def test_numba_is_not_loaded_for_what_is_small(monkeypatch):
    monkeypatch.setattr(checksums, "compile_kernel", lambda: pytest.fail("it was asked for"))
    monkeypatch.setattr(checksums, "MIN_NUMBERS_TO_COMPILE", 101)
    assert choose_kernel([torch.zeros(60), torch.zeros(40)]) is None
    with pytest.raises(pytest.fail.Exception):
        choose_kernel([torch.zeros(60), torch.zeros(41)])
