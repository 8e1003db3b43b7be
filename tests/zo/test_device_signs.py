"""Signs that are drawn where the parameters are end at the bits of NumPy's."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_dpzo.zo import device_signs
from hf_dpzo.zo.device_signs import CHUNKS_AT_ONCE, Part, add_by_torch, add_on_device
from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.philox import CHUNK_SIZE, Stream
from hf_dpzo.zo.torch_philox import draw_words

from support import device_cases
from support.device_cases import agrees, cases, several_parts, take_a_step


CASES = list(cases())
NAMES = [name for name, _ in CASES]
# A folder that holds Triton, for those who do not want it among what all tests import (`pip install --target`).
FOLDER = os.environ.get("TRITON_FOLDER", "")


def run_with_triton(script: str, **environment: str):
    """Return what a script of `support` prints as JSON, run in a process that can import Triton."""
    if not FOLDER and find_spec("triton") is None:
        pytest.skip(
            "needs Triton, which runs and compiles the kernel on a CPU; install it, or name it in TRITON_FOLDER"
        )
    support = Path(device_cases.__file__).parent
    paths = [str(support.parents[1]), str(support.parent), os.environ.get("PYTHONPATH"), FOLDER]
    found = {"PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    command = [sys.executable, support / script]
    run = subprocess.run(command, env={**os.environ, **found}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def interpreted():
    """Which cases the kernel gets right in Triton's interpreter."""
    return run_with_triton("device_cases.py", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_kernel_compiles_to_code_that_fuses_nothing_and_draws_each_word_once(tmp_path):
    """A compiler that let each thread draw the words of all would need hundreds of products."""
    for found in run_with_triton("compiled_kernel.py", TRITON_CACHE_DIR=str(tmp_path)):
        products, fused, sums, stores = (
            found[r"mul\.hi\.u64"],
            found[r"\bfma\."],
            found[r"add\.f32"],
            found[r"st\.global"],
        )
        assert (products, fused) == (20, 0)
        assert sums == 2 * stores  # Each coordinate is added to the sum of a direction, and to the parameter.


@pytest.mark.parametrize("name", [*NAMES, "several parts", "is chosen", "a step", "sums"])
def test_the_kernel_of_triton_ends_at_the_bits_of_numpy(name, interpreted):
    assert interpreted[name]


@pytest.mark.parametrize(("name", "case"), CASES, ids=NAMES)
def test_operations_of_torch_end_at_the_bits_of_numpy(name, case):
    assert agrees(add_on_device, **case)


def test_operations_of_torch_do_several_parts():
    assert several_parts(add_on_device)


@pytest.mark.parametrize("address", [(0, 0, 0, 0), (2**18, 3, 65535, 2**40), (5, 700, 1, 2)])
@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_operations_of_torch_draw_the_words_of_numpy(seed, address):
    chunk, index, direction, step = address
    words = draw_words(range(chunk, chunk + 1), (index, step), direction, seed=seed, device=torch.device("cpu"))
    assert words.numpy().tobytes() == Stream(seed).seek(address).random_raw(CHUNK_SIZE // 64).tobytes()


def test_a_step_that_is_drawn_on_the_device_ends_at_the_bits_of_one_drawn_by_numpy():
    pairs = zip(take_a_step(on_device=True), take_a_step(on_device=False), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_parameters_with_equal_weights_take_one_launch(monkeypatch):
    launches = []
    monkeypatch.setattr("hf_dpzo.zo.directions.add_on_device", lambda parts, *_, **__: launches.append(len(parts)))
    take_a_step(on_device=True, parts=5)
    assert launches == [5, 5, 5, 5, 1, 4]  # Four probe points, and an update with two learning rates.


def test_pruned_directions_are_drawn_by_numpy(monkeypatch):
    monkeypatch.setattr("hf_dpzo.zo.directions.add_on_device", lambda *_, **__: pytest.fail("it knows no mask"))
    mask = Mask([torch.arange(70).numpy() % 2 == 0])
    parameter = torch.zeros(70, device="meta")
    monkeypatch.setattr(Rademacher, "_combine_on_device", lambda *_: torch.zeros(70, device="meta"))
    Rademacher(seed=0, sizes=[70], mask=mask).add_all_([parameter], step=0, weights=[{0: 1.0}])


class FakeKernel:
    """Stands for the module of the kernel; what it does is given to `add_by_triton`."""

    COORDINATES_PER_PROGRAM = 8192


@pytest.fixture
def choose(monkeypatch):
    """A function that chooses what draws on this device, as if Triton did to values what is passed."""

    def choose(add, dtype=torch.float32, *, devices=("cpu",), kernel=FakeKernel):
        monkeypatch.setattr(device_signs, "TRITON_DEVICES", devices)
        monkeypatch.setattr(device_signs, "_load_triton", lambda: kernel)
        monkeypatch.setattr(
            device_signs, "add_by_triton", lambda kernel, parts, *rest, **given: add(*parts, *rest, **given)
        )
        return device_signs.choose_triton.__wrapped__(torch.device("cpu"), dtype)

    return choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_that_draws_right_is_chosen(dtype, choose):
    assert choose(add_by_torch, dtype) is FakeKernel


def test_no_kernel_is_chosen_without_triton_for_other_types_and_on_other_devices(choose):
    assert choose(add_by_torch, torch.float64) is None
    assert choose(add_by_torch, devices=("cuda", "xpu")) is None
    assert choose(add_by_torch, kernel=None) is None


def test_a_kernel_that_fails_or_draws_wrong_gives_way_to_operations_of_torch_with_a_warning(choose):
    with pytest.warns(UserWarning, match=r"triton: it raises ZeroDivisionError on cpu, so signs are drawn"):
        assert choose(lambda *_, **__: 1 / 0) is None
    with pytest.warns(UserWarning, match=r"triton: its bits are not those of NumPy on cpu"):
        assert choose(lambda *_, **__: None) is None


def test_operations_of_torch_hold_some_chunks_at_a_time():
    drawn = []

    def counting(chunks, *args, **kwargs):
        drawn.append(len(chunks))
        return draw_words(chunks, *args, **kwargs)

    part = Part(values=torch.zeros((CHUNKS_AT_ONCE + 2) * CHUNK_SIZE), index=0, start=CHUNK_SIZE // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_signs, "draw_words", counting)
        add_by_torch(part, {0: 1.0}, seed=0, step=0)
    assert drawn == [CHUNKS_AT_ONCE, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "case"), CASES, ids=NAMES)
def test_a_gpu_ends_at_the_bits_of_numpy(name, case):
    def add(parts, weights, **numbers):
        on_gpu = [Part(values=part.values.cuda(), index=part.index, start=part.start) for part in parts]
        add_on_device(on_gpu, weights, **numbers)
        for part, moved in zip(parts, on_gpu, strict=True):
            part.values.copy_(moved.values)

    assert agrees(add, **case)
