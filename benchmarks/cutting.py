"""What it costs that a row moves few others: micro-batches cut as in training, beside rows filled in one after another.

    python benchmarks/cutting.py

Rows are those of lora.yaml, or made up, all of one length. Times are of forward passes of the same
model, side by side in turns, so that another load on the machine meets all alike.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from shared import LoraRun, table
from transformers import DataCollatorWithPadding

from hf_dpzo.data.cutting import count_tokens, cut_into_micro_batches
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.privacy.noise import draw_keys


BATCHES, TIMED = 200, 4

Rows = list[dict[str, Any]]
Cut = Callable[[Rows, int], list[Rows]]


def cut_as_in_training(rows: Rows, size: int) -> list[Rows]:
    """Halve an interval of numbers, each of which follows from its row alone."""
    keys = draw_keys(len(rows)).tolist()
    fetched = [FetchedRow(unit=slot, row=row, slot=slot, key=keys[slot]) for slot, row in enumerate(rows)]
    return [[one.row for one in part] for part in cut_into_micro_batches(fetched, size)]


def fill_in_order_of_length(rows: Rows, size: int) -> list[Rows]:
    """Fill each micro-batch before the next, where one row more would move all after it."""
    return fill_as_drawn(sorted(rows, key=count_tokens), size)


def fill_as_drawn(rows: Rows, size: int) -> list[Rows]:
    """Fill each micro-batch before the next, in the order in which rows were drawn."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


CUTS: dict[str, Cut] = {
    "as in training": cut_as_in_training,
    "filled by length": fill_in_order_of_length,
    "filled as drawn": fill_as_drawn,
}


def draw_batches(rows: Sequence[dict[str, Any]], expected: int, count: int) -> Iterator[Rows]:
    """Draw Poisson batches of `expected` rows on average; seeded, because nothing here is private."""
    drawing = random.Random(0)
    rate = expected / len(rows)
    for _ in range(count):
        yield [row for row in rows if drawing.random() < rate]


def count(name: str, rows: Sequence[dict[str, Any]], expected: int, size: int) -> Iterator[list[str]]:
    """Yield a row of the table for each way to cut: how full micro-batches are, and how much padding they take."""
    batches = list(draw_batches(rows, expected, BATCHES))
    own = sum(count_tokens(row) for batch in batches for row in batch)
    for title, cut in CUTS.items():
        parts = [part for batch in batches for part in cut(batch, size)]
        filled = sum(map(len, parts)) / (size * len(parts))
        padded = sum(len(part) * max(map(count_tokens, part)) for part in parts)
        yield [
            name,
            f"{expected} by {size}",
            title,
            f"{len(parts) / BATCHES:.1f}",
            f"{filled:.2f}",
            f"{padded / own:.2f}",
        ]


@torch.no_grad()
def measure(start: LoraRun, rows: Sequence[dict[str, Any]], expected: int, size: int) -> list[str]:
    """Return the median seconds of the forward passes of a batch, for each way to cut it."""
    model = start.model()
    loss, collate = start.loss(model), DataCollatorWithPadding(start.tokenizer)
    seconds: dict[str, list[float]] = {title: [] for title in CUTS}
    for batch in draw_batches(rows, expected, TIMED + 1):
        for title, cut in CUTS.items():
            parts = [collate(part) for part in cut(batch, size)]
            started = time.perf_counter()
            for inputs in parts:
                loss(model, inputs)
            seconds[title].append(time.perf_counter() - started)
    return [f"{expected} by {size}", *(f"{statistics.median(found[1:]):.2f}" for found in seconds.values())]


def measure_cut(rows: Sequence[dict[str, Any]], expected: int, size: int) -> float:
    """Return the milliseconds that cutting a batch takes."""
    batches = list(draw_batches(rows, expected, BATCHES))
    started = time.perf_counter()
    for batch in batches:
        cut_as_in_training(batch, size)
    return 1000 * (time.perf_counter() - started) / BATCHES


def main() -> None:
    """Measure, and print two tables."""
    torch.set_num_threads(1)
    start = LoraRun.load()
    reviews = [{"input_ids": row["input_ids"]} for row in start.train]
    drawing = random.Random(0)
    made_up = [{"input_ids": [drawing.randrange(999) for _ in range(128)]} for _ in range(5000)]
    counted = [
        line
        for name, rows in {"reviews": reviews, "128 tokens": made_up}.items()
        for expected, size in ((8, 8), (64, 8), (64, 32), (1000, 32))
        for line in count(name, rows, expected, size)
    ]
    timed = [measure(start, list(start.train), expected, size) for expected, size in ((8, 8), (64, 8), (64, 32))]
    sys.stdout.write(
        "\n".join(
            [
                *table(
                    ("rows", "batch", "cut", "micro-batches", "filled", "tokens with padding over without"), counted
                ),
                "",
                *table(("batch", *(f"{title}, seconds" for title in CUTS)), timed),
                "",
                f"Cutting a batch of 64 takes {measure_cut(reviews, 64, 8):.2f} ms, one of 1000 "
                f"{measure_cut(reviews, 1000, 32):.1f} ms.",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
