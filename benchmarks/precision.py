"""What fewer bits cost: full parameters in bfloat16, and frozen bases in bfloat16 and int8, beside float32.

    python benchmarks/precision.py full
    python benchmarks/precision.py bases
    python benchmarks/precision.py passes

`full` trains all parameters of the model of lora.yaml, in float32 and in bfloat16 with several ways of rounding: how
far weights are from where they were after cycles of perturbing and walking back, and what noise-free steps reach.
`bases` compares the losses, the coefficients and the weights of the adapter of lora.yaml on frozen bases. `passes`
compares the time of forward passes and steps on random weights of the same shape. int8 needs torchao.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from bases import compare_coefficients, time_passes
from shared import LoraRun, row, table
from transformers import DataCollatorWithPadding
from walking import Walker, Way


ROWS, EVALUATED, SHORT = 8, 200, 32
CYCLES, STEPS, SMOOTHING, RATE, CLIP = 8, 24, 1e-3, 5e-5, 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("full", "bases", "passes"))
    torch.set_num_threads(1)
    with torch.no_grad():
        lines = {"full": full, "bases": compare_coefficients, "passes": time_passes}[parser.parse_args(argv).what]()
    sys.stdout.write("\n".join(lines) + "\n")


WAYS = {
    "float32, walking back": Way(dtype=torch.float32),
    "bfloat16, to nearest, walking back": Way(),
    "bfloat16, stochastic, walking back": Way(stochastic=True),
    "bfloat16, stochastic updates, from a copy": Way(stochastic=True, copied=True),
}


def full() -> list[str]:
    """The table of ways to train all parameters."""
    start = LoraRun.load("--adapter", "none", "--max_length", str(SHORT))
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


if __name__ == "__main__":
    main()
