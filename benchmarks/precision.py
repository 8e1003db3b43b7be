"""What fewer bits cost: full parameters in bfloat16, and frozen bases in bfloat16 and int8, beside float32.

    python benchmarks/precision.py full
    python benchmarks/precision.py bases

`full` trains all parameters of the quick start's model, in float32 and in bfloat16 with several ways of rounding: how
far weights are from where they were after cycles of perturbing and walking back, and what noise-free steps reach.
`bases` compares the losses, the coefficients, the time and the weights of the quick start's adapter on frozen bases.
int8 needs torchao.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from shared import QuickStart, row, table
from transformers import DataCollatorWithPadding
from transformers.utils import is_torchao_available

from hf_dpzo.models.precision import inner_tensors
from hf_dpzo.recipe.loading import load_model
from hf_dpzo.zo.directions import Rademacher


ROWS, EVALUATED, SHORT = 8, 200, 32
CYCLES, STEPS, SMOOTHING, RATE, CLIP = 8, 24, 1e-3, 5e-5, 10.0
COMPARED, DIRECTIONS, SMOOTHINGS, REPEATS, WIDTH = 16, 3, (1e-2, 5e-2), 5, 64
# Keys the bits that rounding draws apart from those that directions are made of.
_ROUNDING = int.from_bytes(b"rounding", "big")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("full", "bases"))
    torch.set_num_threads(1)
    with torch.no_grad():
        lines = {"full": full, "bases": bases}[parser.parse_args(argv).what]()
    sys.stdout.write("\n".join(lines) + "\n")


# ---- Full parameters ----


@dataclass(frozen=True, kw_only=True)
class Way:
    """How weights are kept and rounded.

    Args:
        dtype: of the weights.
        stochastic: whether a sum is rounded up or down at random, by how near it is, with bits from a public seed.
        copied: whether weights are put back from a copy, and not by walking back; then updates alone are stochastic.
    """

    dtype: torch.dtype = torch.bfloat16
    stochastic: bool = False
    copied: bool = False


WAYS = {
    "float32, walking back": Way(dtype=torch.float32),
    "bfloat16, to nearest, walking back": Way(),
    "bfloat16, stochastic, walking back": Way(stochastic=True),
    "bfloat16, stochastic updates, from a copy": Way(stochastic=True, copied=True),
}


class Walker:
    """Adds multiples of public directions to weights, and rounds."""

    def __init__(self, parameters: list[torch.nn.Parameter], way: Way, seed: int) -> None:
        self.parameters, self.way, self._seed, self._count = parameters, way, seed, 0
        self.directions = Rademacher(seed=seed, sizes=[parameter.numel() for parameter in parameters])
        self._copies = [parameter.clone() for parameter in parameters] if way.copied else []

    def add(self, step: int, distance: float, *, update: bool = False) -> None:
        """Add `distance` times the direction of `step`, and round."""
        self._count += 1
        for index, parameter in enumerate(self.parameters):
            moved = self.directions.values(index=index, step=step, direction=0).mul_(distance)
            moved = moved.view_as(parameter).add_(parameter.float())
            if self.way.stochastic and (update or not self.way.copied):
                moved = stochastically(moved, self._bits(index, parameter.numel()))
            parameter.copy_(moved)

    def back(self, step: int, distance: float) -> None:
        """Undo `add` of the negative `distance`."""
        if not self.way.copied:
            self.add(step, distance)
        for parameter, copy in zip(self.parameters, self._copies, strict=False):
            parameter.copy_(copy)

    def differences(self, step: int, losses: Callable[[], torch.Tensor], smoothing: float) -> torch.Tensor:
        """The losses' differences `[rows]` over twice the smoothing; then the weights are put back."""
        self.add(step, smoothing)
        above = losses()
        if self.way.copied:
            self.back(step, -smoothing)
            self.add(step, -smoothing)
        else:
            self.add(step, -2 * smoothing)
        below = losses()
        self.back(step, smoothing)
        return (above - below) / (2 * smoothing)

    def update(self, step: int, distance: float) -> None:
        """Take a step, and remember where it led to."""
        self.add(step, distance, update=True)
        for parameter, copy in zip(self.parameters, self._copies, strict=False):
            copy.copy_(parameter)

    def _bits(self, index: int, count: int) -> torch.Tensor:
        """16 uniform bits for each coordinate, from a counter: whoever has the seed can draw them again."""
        philox = np.random.Philox(
            key=np.array([self._seed, _ROUNDING], dtype=np.uint64),
            counter=np.array([0, 0, index, self._count], dtype=np.uint64),
        )
        return torch.from_numpy(philox.random_raw(-(-count // 4)).view(np.uint16)[:count].astype(np.int32))


def stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Round float32 `values` to bfloat16, up or down with the probability that makes the mean right."""
    whole = values.contiguous().view(torch.int32) + bits.view_as(values)
    return (whole & -65536).view(torch.float32)


def full() -> list[str]:
    """The table of ways to train all parameters."""
    start = QuickStart.load("--adapter", "none", "--max_length", str(SHORT))
    seed, train, held = start.args.seed, _short(start.train), _short(start.evaluation)
    collate = DataCollatorWithPadding(start.tokenizer, padding="max_length", max_length=SHORT)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [[train[i] for i in order[step * ROWS : (step + 1) * ROWS]] for step in range(STEPS)]
    titles = ("weights", "bytes", "drift of cycles", "moved by steps", "held-out loss", "accuracy", "a step")
    rows = []
    for name, way in WAYS.items():
        model = start.model().to(way.dtype)
        loss = start.loss(model)
        if name == next(iter(WAYS)):
            rows.append(["untouched", "", "", "", *_evaluated(loss, model, held[:EVALUATED], collate), ""])
        size = sum(p.numel() * p.element_size() for p in model.parameters()) * (1 + way.copied)
        drift = _drift(Walker(list(model.parameters()), way, seed))
        model = start.model().to(way.dtype)
        walker, before = Walker(list(model.parameters()), way, seed), [p.clone() for p in model.parameters()]
        seconds = _trained(walker, partial(loss, model), [collate(batch) for batch in batches])
        moved, reached = _distance(walker.parameters, before), _evaluated(loss, model, held[:EVALUATED], collate)
        rows.append([name, f"{size / 1e6:.0f} MB", f"{drift:.2g}", f"{moved:.2g}", *reached, f"{seconds:.1f} s"])
        sys.stderr.write(f"{row(rows[-1])}\n")
    note = f"{CYCLES} cycles, {STEPS} steps; distances relative to the root mean square of the weights."
    return [*table(titles, rows), "", note]


def _trained(walker: Walker, loss: Callable, batches: list[dict]) -> float:
    """Take noise-free steps, and return the seconds of one."""
    started = time.perf_counter()
    for step, inputs in enumerate(batches):
        found = walker.differences(step, partial(loss, inputs), SMOOTHING)
        walker.update(step, -RATE * found.clamp(-CLIP, CLIP).mean().item())
    return (time.perf_counter() - started) / len(batches)


def _drift(walker: Walker) -> float:
    """How far weights are from where they were, after cycles in which nothing was learned."""
    before = [parameter.clone() for parameter in walker.parameters]
    for step in range(CYCLES):
        walker.differences(step, lambda: torch.zeros(1), SMOOTHING)
    return _distance(walker.parameters, before)


def _distance(parameters: list[torch.nn.Parameter], before: list[torch.Tensor]) -> float:
    squares = sum((a.double() - b.double()).square().sum().item() for a, b in zip(parameters, before, strict=True))
    return (squares / sum(b.double().square().sum().item() for b in before)) ** 0.5


def _evaluated(loss: Callable, model: torch.nn.Module, rows: list[dict], collate: Callable) -> list[str]:
    losses, right = [], 0
    for start in range(0, len(rows), ROWS):
        inputs = collate(rows[start : start + ROWS])
        found, scores = loss.evaluate(model, inputs)
        losses += found.tolist()
        right += (scores.argmax(dim=-1) == inputs["labels"]).sum().item()
    return [f"{np.mean(losses):.4f}", f"{right / len(rows):.3f}"]


def _short(rows: Sequence[dict]) -> list[dict]:
    """The first rows that are not cut; all of another length are left out."""
    return [row for row in rows if len(row["input_ids"]) < SHORT][: max(EVALUATED, ROWS * STEPS)]


# ---- Bases ----


def bases() -> list[str]:
    """The table of frozen bases."""
    start = QuickStart.load("--max_length", str(WIDTH))
    collate = DataCollatorWithPadding(start.tokenizer, padding="max_length", max_length=WIDTH)
    inputs = collate([start.train[i] for i in range(COMPARED)])
    with tempfile.TemporaryDirectory() as folder:
        bare = replace(start.recipe, adapter="none")
        load_model(bare, start.tokenizer, seed=start.args.seed).save_pretrained(folder)
        unpacked = replace(start.recipe, model_name_or_path=folder, gguf_file=None)
        kinds = [("float32", None), ("bfloat16", None)]
        kinds += [("float32", "int8"), ("bfloat16", "int8")] if is_torchao_available() else []
        found = {}
        for dtype, quantization in kinds:
            recipe = replace(unpacked, dtype=dtype, quantization=quantization)
            found[dtype, quantization] = _of_base(replace(start, recipe=recipe), inputs)
    plain = found["float32", None]
    titles = ["base", "weights", "CPU time", "losses differ by"]
    titles += [f"coefficients, smoothing {smoothing:g}" for smoothing in SMOOTHINGS]
    rows = []
    for (dtype, quantization), one in found.items():
        cells = [dtype if quantization is None else f"{quantization}, else {dtype}", f"{one.size / plain.size:.2f}"]
        cells += [f"{one.seconds / plain.seconds:.2f}", f"{(one.losses - plain.losses).abs().mean():.2g}"]
        for here, there in zip(one.coefficients, plain.coefficients, strict=True):
            same = (here.sign() == there.sign()).double().mean()
            cells.append(
                f"{there.std():.3g}" if one is plain else f"± {(here - there).std():.2g}, {same:.0%} same sign"
            )
        rows.append(cells)
    note = (
        f"float32: {plain.size / 1e6:.0f} MB, {plain.seconds:.2f} s for {COMPARED} rows of {WIDTH} tokens; one thread."
    )
    return [*table(titles, rows), "", note]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one base: losses of rows, for each smoothing their coefficients, seconds of a pass, bytes of weights."""

    losses: torch.Tensor
    coefficients: list[torch.Tensor]
    seconds: float
    size: int


def _of_base(start: QuickStart, inputs: dict) -> Measured:
    model = start.model()
    loss = start.loss(model)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    walker = Walker(adapter, Way(dtype=torch.float32), start.args.seed)
    # A new adapter is a saddle, since half of its matrices are zero: look at one that has moved.
    walker.add(10**6, 1e-2)
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()  # Of the processor, so that others beside it do not count.
        losses = loss(model, inputs)
        seconds.append(time.process_time() - started)
    coefficients = []
    for smoothing in SMOOTHINGS:
        of_rows = [walker.differences(step, partial(loss, model, inputs), smoothing) for step in range(DIRECTIONS)]
        coefficients.append(torch.stack(of_rows, dim=1))
    return Measured(
        losses=losses,
        coefficients=coefficients,
        seconds=float(np.median(seconds)),
        size=sum(t.numel() * t.element_size() for p in model.parameters() for t in inner_tensors(p.data)),
    )


if __name__ == "__main__":
    main()
