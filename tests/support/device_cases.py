"""Cases for what draws signs where the parameters are, and the sum by NumPy that each has to agree with.

Run as a script it prints, as JSON, which cases the kernel of Triton gets right in Triton's interpreter. That is a
process of its own because `TRITON_INTERPRET` is read when Triton is imported.
"""

import json
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch

from hf_dpzo.distributed import checksums
from hf_dpzo.zo.device_signs import Part
from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.philox import CHUNK_SIZE
from hf_dpzo.zo.walk import AddingWalk, ProbePoint


# What adds `weights` to parts: (parts, weights, seed=, step=) -> None.
Adder = Callable[..., None]
MANY = {k: (-1) ** k * 10.0 ** -(k % 7) for k in range(0, 3 * 33, 3)}
SOME = {0: 1e-3, 7: -0.3, 300: 0.0, 2: 12345.678}
ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -3e38, 6.1e-5, 65504.0, 1.00390625, 1.01171875]


def numbers(size: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    values[: len(ODD)] = torch.tensor(ODD)[:size]
    return values.to(dtype)


def reference(part: Part, weights: dict[int, float], *, seed: int, step: int) -> torch.Tensor:
    """Return what NumPy's words make of a part."""
    stop = part.start + len(part.values)
    directions = Rademacher(seed=seed, sizes=[1] * part.index + [stop])
    total = None
    for k, weight in weights.items():
        z = directions.values(index=part.index, step=step, direction=k, start=part.start, stop=stop)
        z = z * torch.tensor(weight, dtype=torch.float32)
        total = z if total is None else total + z
    return part.values.clone().add_(total)


def agrees(
    add: Adder,
    *,
    size: int,
    start: int = 0,
    index: int = 0,
    seed: int = 5,
    step: int = 3,
    weights: dict[int, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Return whether `add` ends at the bits of NumPy, and touches nothing before and after the part."""
    weights = SOME if weights is None else weights
    memory = numbers(size + 20, dtype)
    part = Part(values=memory[7 : 7 + size], index=index, start=start)
    expected = memory.clone()
    expected[7 : 7 + size] = reference(part, weights, seed=seed, step=step)
    add([part], weights, seed=seed, step=step)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    is_number = ~expected.isnan()
    return bool(
        torch.equal(memory.isnan(), ~is_number)
        and torch.equal(memory.view(bits)[is_number], expected.view(bits)[is_number])
    )


def several_parts(add: Adder) -> bool:
    """Return whether parts of several parameters, whole and cut, are all right."""
    shapes = [(70, 0, 0), (CHUNK_SIZE + 3, 1, 0), (0, 2, 0), (1, 3, 9), (9000, 4, CHUNK_SIZE - 100)]
    parts = [Part(values=numbers(s, torch.float32).nan_to_num(), index=i, start=a) for s, i, a in shapes]
    expected = [reference(part, SOME, seed=1, step=0) for part in parts if len(part.values)]
    add([part for part in parts if len(part.values)], SOME, seed=1, step=0)
    found = [part.values for part in parts if len(part.values)]
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def take_a_step(*, on_device: bool, parts: int = 3) -> list[torch.Tensor]:
    """Return parameters after the walk and the update of a step, drawn by the device's way or NumPy's."""
    kind = type("OnDevice", (Rademacher,), {"_is_drawn_on_device": lambda *_: on_device})
    parameters = [torch.nn.Parameter(numbers(900 + i, torch.float32).nan_to_num()) for i in range(parts)]
    groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:]}]
    optimizer = ZOOptimizer(groups, directions=kind, seed=2**63 + 1, lr=0.25)
    optimizer.begin_stage()
    points = [ProbePoint(direction=k, position=p) for k in range(2) for p in (1e-3, -1e-3)]
    walk = AddingWalk(parameters, optimizer.directions, step=6, points=points)
    with optimizer.follow(walk, step=6), walk:
        list(walk)
    optimizer.receive(step=6, coefficients=[0.7, -1e-4])
    optimizer.step()
    return [parameter.detach() for parameter in parameters]


def cases() -> Iterator[tuple[str, dict]]:
    for size in (1, 63, 64, 65, 255, 257, 8191, 8192, 8193, CHUNK_SIZE + 3):
        yield f"size {size}", {"size": size, "weights": {0: 1e-3}}
    for start in (1, 64, 255, 8191, CHUNK_SIZE - 1, 2**31 - 5, 2**32 + 77, 2**33 - 3):
        yield f"start {start}", {"size": 300, "start": start}
    for seed in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield f"seed {seed}", {"size": 200, "seed": seed}
    for step in (0, 1, 16, 2**40):
        yield f"step {step}", {"size": 200, "step": step}
    for index in (1, 700):
        yield f"index {index}", {"size": 200, "index": index}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, weights in (("one", {9: -1e-3}), ("some", SOME), ("backwards", dict(reversed(SOME.items())))):
            yield f"{dtype} {name}", {"size": 600, "dtype": dtype, "weights": weights}
        # Sums in the middle between two numbers of 16 bits, which are rounded to the even one.
        yield f"{dtype} ties", {"size": 600, "dtype": dtype, "weights": {0: 2.0**-9, 1: 2.0**-12}}
    yield "many", {"size": 130, "weights": MANY}
    yield "zero", {"size": 130, "weights": {0: -0.0}}


def sums_agree() -> bool:
    """Return whether the kernel for checksums agrees with operations of torch, and is chosen."""
    tensors = [numbers(size, torch.float32) for size in (1, 2, 4095, 4096, 4097, 9001)]
    tensors += [numbers(size, torch.bfloat16) for size in (3, 4, 8193)]
    expected = checksums.checksum_groups([[tensor] for tensor in tensors])
    checksums.TRITON_DEVICES = ("cpu",)
    checksums.choose_triton.cache_clear()
    found = checksums.checksum_groups([[tensor] for tensor in tensors])
    return found == expected and checksums.choose_triton(torch.device("cpu")) is checksums.load_sums()


def _run_in_interpreter() -> dict[str, bool]:
    from hf_dpzo.zo import device_signs, triton_kernel

    def add(parts: list[Part], weights: dict[int, float], **numbers: int) -> None:
        device_signs.add_by_triton(triton_kernel, parts, weights, **numbers)

    with np.errstate(all="ignore"), torch.no_grad():
        results = {"sums": sums_agree()}
        results |= {name: agrees(add, **case) for name, case in cases()}
        results["several parts"] = several_parts(add)
        device_signs.TRITON_DEVICES = ("cpu",)
        results["is chosen"] = device_signs.choose_triton(torch.device("cpu"), torch.bfloat16) is triton_kernel
        pairs = zip(take_a_step(on_device=True), take_a_step(on_device=False), strict=True)
        results["a step"] = all(torch.equal(one, other) for one, other in pairs)
    return results


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run_in_interpreter()))
