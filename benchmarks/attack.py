"""Attacks releases: does one row or one user more move a release by more than its sensitivity?

    python benchmarks/attack.py --pairs 10000
    python benchmarks/attack.py --plant clip

A pair is a data set, and the same with one unit more at any place: an ordinary row, an odd one, or a user with several.
Methods, sizes, shapes and processes are random. All take part in the batch, no noise is added, and whoever is in both
data sets has the same random key, so that the two sums can be compared in exact integers. Three things are checked:

- the sums differ by the sensitivity of the method's norm at most;
- the difference is what the unit releases by itself, so nobody else's part moved: to the last bit in public shapes, and
  elsewhere by no more than the bound on isolation, for a loss that moves with its micro-batch by a known amount;
- no more rows of others have other company in their micro-batches than that bound counts.

With `--plant`, a fault is planted, which the attack has to find.
"""

import argparse
import contextlib
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from attack_plans import Pipeline, Plan, Released
from odd_rows import NO_MAPPINGS, ODD, draw_ordinary
from shared import table

from hf_dpzo.data import collation, units
from hf_dpzo.data.collation import LogicalBatchCollator, MicroBatch
from hf_dpzo.data.sampling import KEY_BITS
from hf_dpzo.privacy import mechanism
from hf_dpzo.privacy.clipping import SENSITIVITY, clip_to_lattice
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteNoise


# How many data sets with one unit more are compared with the same one without it.
NEIGHBORS = 10


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a pair showed.

    Args:
        title: the plan's method, noise and unit.
        distance: the distance of the two sums, over what is allowed: the sensitivity, and the bound on isolation.
        excess: how far the parts of others moved beyond what is allowed, in clip norms; 0 if within that.
        reached: how many rows of others got other company, over how many may.
    """

    title: str
    distance: float
    excess: float
    reached: float

    @property
    def is_beyond(self) -> bool:
        """Whether the guarantee does not hold for this pair."""
        return self.distance > 1 or self.excess > 0 or self.reached > 1


def attack(plan: Plan, drawing: random.Random, neighbors: int) -> Iterator[Found]:
    """Yield what each of several data sets shows that have one unit more than the same data set."""
    pipeline = Pipeline(plan)
    kinds = sorted(set(ODD) - (NO_MAPPINGS if plan.max_rows is not None else set()))
    base = [_draw_row(drawing, kinds, odd=drawing.choice([0.0, 0.2, 0.5])) for _ in range(drawing.randrange(0, 25))]
    if plan.max_rows is not None:
        base = [{**row, "user": drawing.randrange(5)} for row in base]
    keys = [drawing.getrandbits(KEY_BITS) for _ in base]
    without = pipeline.release(base, keys)
    for _ in range(neighbors):
        count = 1 if plan.max_rows is None else drawing.choice([1, 1, 2, 3, 9])
        unit = [_draw_row(drawing, kinds, odd=0.7) for _ in range(count)]
        if plan.max_rows is not None:
            unit = [{**row, "user": "ann"} for row in unit]
        own_keys = [drawing.getrandbits(KEY_BITS) for _ in unit]
        rows, row_keys = list(base), list(keys)
        for row, key in zip(unit, own_keys, strict=True):
            # A user's rows keep their order, because a batch of few of them takes the first ones here.
            place = len(rows) if count > 1 else drawing.randrange(len(rows) + 1)
            rows.insert(place, row)
            row_keys.insert(place, key)
        yield _judge(plan, without, pipeline.release(rows, row_keys), pipeline.release(unit, own_keys))


def _draw_row(drawing: random.Random, kinds: Sequence[str], *, odd: float) -> Any:
    row = draw_ordinary(drawing)
    return ODD[drawing.choice(kinds)](drawing, row) if drawing.random() < odd else row


def _judge(plan: Plan, without: Released, together: Released, alone: Released) -> Found:
    moved = together.sums - without.sums
    length = sum(int(value) ** 2 for value in moved - alone.sums) ** 0.5 / SENSITIVITY
    reached = sum(together.company[key] != company for key, company in without.company.items())
    # Alone, the unit's own rows are in other micro-batches than among others, and their mean moves like one row.
    allowed = plan.bound * (1 + 1 / plan.micro_batch_size)
    return Found(
        title=plan.title,
        distance=plan.measure(moved.tolist()) / plan.allowed,
        excess=max(0.0, length - allowed),
        reached=reached / plan.reached_rows,
    )


# ---- Faults to plant ----


def _clip_nothing(coefficients: torch.Tensor, clip_norm: float, order: int = 2) -> np.ndarray:
    rows = np.nan_to_num(coefficients.detach().cpu().double().numpy(), posinf=0.0, neginf=0.0)
    return np.trunc(np.clip(rows / clip_norm, -100, 100) * SENSITIVITY).astype(np.int64)


def _clip_to_more(coefficients: torch.Tensor, clip_norm: float, order: int = 2) -> np.ndarray:
    return clip_to_lattice(coefficients, clip_norm, order) * 1001 // 1000


def _fill(rows: Sequence[Any], size: int) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(rows), size):
        yield tuple(rows[start : start + size])


def _give_up(collator: LogicalBatchCollator, micro_batch: MicroBatch) -> tuple[MicroBatch, ...]:
    return tuple(replace(micro_batch, rows=(row,), size=1, inputs=None) for row in micro_batch.rows)


PLANTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "clip": partial(mock.patch.object, mechanism, "clip_to_lattice", _clip_nothing),
    "norm": partial(mock.patch.object, mechanism, "clip_to_lattice", _clip_to_more),
    "cut": partial(mock.patch.object, collation, "cut_into_micro_batches", _fill),
    "failure": partial(mock.patch.object, LogicalBatchCollator, "split_into_rows", _give_up),
}


# ---- The whole attack ----


@contextlib.contextmanager
def everybody_without_noise() -> Iterator[None]:
    """Let all units take part with their first rows, and add no noise, inside the context."""
    with (
        mock.patch.object(BernoulliSampler, "draw", lambda sampler: np.ones(sampler.size, dtype=bool)),
        mock.patch.object(DiscreteNoise, "add", lambda noise, values: values),
        mock.patch.object(units, "choose_subset", lambda count, size: list(range(size))),
    ):
        yield


def run(pairs: int, *, seed: int, plant: str | None = None) -> list[Found]:
    """Return what `pairs` pairs showed.

    Args:
        pairs: the number of pairs.
        seed: of the plans and rows; nothing here is private.
        plant: the fault to plant.
    """
    drawing, found = random.Random(seed), []
    with everybody_without_noise(), PLANTS[plant]() if plant else contextlib.nullcontext():
        while len(found) < pairs:
            found += attack(Plan.draw(drawing), drawing, min(NEIGHBORS, pairs - len(found)))
    return found


def summarize(found: Sequence[Found]) -> list[str]:
    """Return the lines of a table: for each kind of plan how many pairs there were, and how far sums were apart."""
    groups = defaultdict(list)
    for one in found:
        groups[one.title].append(one)
    rows = [
        [
            title,
            str(len(group)),
            f"{max(one.distance for one in group):.12f}",
            str(sum(one.distance > 1 for one in group)),
            str(sum(one.excess > 0 for one in group)),
            f"{max(one.reached for one in group):.2f}",
        ]
        for title, group in sorted(groups.items())
    ]
    titles = (
        "method, noise, unit",
        "pairs",
        "largest distance over the allowed one",
        "beyond",
        "others moved",
        "reached",
    )
    return table(titles, rows)


def main() -> None:
    """Attack, print a table, and exit with 1 if a pair is beyond what is guaranteed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=sorted(PLANTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = run(given.pairs, seed=given.seed, plant=given.plant)
    beyond = sum(one.is_beyond for one in found)
    note = f"{beyond} of {len(found)} pairs are beyond what is guaranteed, in {time.perf_counter() - started:.0f} s."
    sys.stdout.write("\n".join([*summarize(found), "", note]) + "\n")
    sys.exit(beyond > 0)


if __name__ == "__main__":
    main()
