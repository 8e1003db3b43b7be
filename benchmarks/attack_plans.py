"""The plans of attacks, drawn at random, and the way of a data set to what is released of it. See `attack.py`."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from odd_rows import Classifier, OddLoss, Rows, collate

from hf_dpzo.data.collation import LogicalBatch, LogicalBatchCollator
from hf_dpzo.data.sampling import PoissonBatchSampler, SealedRows, batch_capacity
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import SINGLE_PROCESS, Processes, SingleProcess
from hf_dpzo.isolation.bound import count_reached_rows, isolation_bound
from hf_dpzo.methods import METHODS, PrivateMethod
from hf_dpzo.models.state import ModelState
from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.privacy.mechanism import LaplaceSum, SeparateGaussianSum
from hf_dpzo.step.assemble import assemble_estimate
from hf_dpzo.step.descent import Descent
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer


PADDED_LENGTHS = (8, 16)

# Of the smallest plans that methods allow.
STEPS = 3

# By how many clip norms a row's part moves at most with its micro-batch, where shapes are not public.
LEAK = 0.05

# What float32 and shapes move a loss by at most, besides.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a pair has in common, all of it drawn.

    Args:
        method: the method, with its parameters.
        micro_batch_size: the largest number of rows in a micro-batch.
        padded: whether micro-batches have public shapes.
        max_rows: how many rows of a user a batch may hold; `None` if each row is a unit.
        num_processes: the number of processes.
        shares_points: whether they share probe points, and not rows.
    """

    method: PrivateMethod
    micro_batch_size: int
    padded: bool
    max_rows: int | None
    num_processes: int
    shares_points: bool

    @classmethod
    def draw(cls, drawing: random.Random) -> "Plan":
        """Draw a plan of any private method."""
        shares_points, padded = drawing.random() < 0.2, drawing.random() < 0.6
        return cls(
            method=_draw_method(drawing, rounded=not padded),
            micro_batch_size=drawing.choice([1, 2, 3, 4, 8]),
            padded=padded,
            max_rows=drawing.choice([None, None, None, 1, 2, 5, 9]),
            num_processes=drawing.choice([2, 3]) if shares_points or drawing.random() < 0.2 else 1,
            shares_points=shares_points,
        )

    @property
    def title(self) -> str:
        """The method, its noise and the unit."""
        noise = "laplace" if isinstance(self.method.mechanism, LaplaceSum) else "gaussian"
        names = {kind: name for name, kind in METHODS.items()}
        return f"{names[type(self.method)]}, {noise}, {'rows' if self.max_rows is None else 'users'}"

    @property
    def is_bitwise(self) -> bool:
        """Whether nobody's part may move in a single bit, because no shape depends on who else is there."""
        return self.padded or self.micro_batch_size == 1

    @cached_property
    def leak(self) -> float:
        """How far the loss of a row moves one way or the other with its micro-batch, besides rounding."""
        return 0.0 if self.is_bitwise else LEAK / isolation_bound(self.method, STEPS, 2.0, reached_rows=1)

    @cached_property
    def reached_rows(self) -> int:
        """To how many rows of others one unit more may give other company in their micro-batches."""
        return count_reached_rows(
            micro_batch_size=self.micro_batch_size,
            fixed_shapes=self.is_bitwise,
            batch_capacity=batch_capacity(8, max_rows_per_unit=self.max_rows or 1),
            rows_per_unit=self.max_rows or 1,
        )

    @cached_property
    def bound(self) -> float:
        """How far the parts of others may move in all, in clip norms of the mechanism."""
        if self.is_bitwise:
            return 0.0
        return isolation_bound(self.method, STEPS, 2 * self.leak + ROUNDING, reached_rows=self.reached_rows)

    @property
    def _norms(self) -> int:
        """The square of the sensitivity, in clip norms."""
        return self.method.num_directions if isinstance(self.method.mechanism, SeparateGaussianSum) else 1

    def measure(self, sums: Sequence[int]) -> float:
        """Return the length of a difference of sums, in sensitivities. Whether it is above 1 is decided exactly."""
        if isinstance(self.method.mechanism, LaplaceSum):
            return sum(map(abs, sums)) / SENSITIVITY  # Exact where it matters, since the divisor is a power of two.
        squares, largest = sum(value * value for value in sums), self._norms * SENSITIVITY**2
        length = (squares / largest) ** 0.5
        return max(length, 1 + 2.0**-52) if squares > largest else min(length, 1.0)

    @property
    def allowed(self) -> float:
        """How long a difference may be, in sensitivities."""
        return 1 + self.bound / self._norms**0.5


def _draw_method(drawing: random.Random, *, rounded: bool) -> PrivateMethod:
    """Draw a method; one whose clip norm is far above what rounding moves losses by, if they are `rounded`."""
    name = drawing.choice(sorted(name for name, kind in METHODS.items() if issubclass(kind, PrivateMethod)))
    settings: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "expected_batch_size": 8,
        "smoothing": 1e-2 if rounded else drawing.choice([1e-3, 1e-2]),
        "difference": drawing.choice(["central", "forward"]),
        "clip_norm": 10.0 ** drawing.randrange(-1 if rounded else -4, 3),
    }
    if name in ("aggzo", "projected", "zopo", "zoso"):
        settings["num_directions"] = drawing.choice([1, 2, 3, 5])
    if name in ("zopo", "zoso"):
        settings["num_stages"] = 1
    if name == "projected":
        settings["radius"] = 1.0
    if name == "dpzo":
        settings["noise"] = drawing.choice(["gaussian", "laplace"])
    if name == "dpzero":
        settings["paper_noise"] = drawing.random() < 0.5
    return METHODS[name](**settings)


class Simulated(SingleProcess):
    """One of several processes, which run one after the other, the first one last.

    Args:
        rank: the rank of this process.
        size: the number of processes.
        board: what the processes before have added up, by the number of the call.
    """

    def __init__(self, rank: int, size: int, board: dict[int, np.ndarray]) -> None:
        self.rank, self.size = rank, size
        self._board, self._calls = board, 0

    def reduce_sum(self, values: np.ndarray) -> np.ndarray | None:
        """Return the sum of what all processes passed, in the last one to run."""
        self._board[self._calls] = self._board.get(self._calls, 0) + values
        self._calls += 1
        return self._board[self._calls - 1] if self.is_first else None


@dataclass(frozen=True, kw_only=True)
class Released:
    """What came of a data set.

    Args:
        sums: the exact sums, Python's integers.
        company: the keys of the rows in the micro-batch of each row, by its key.
    """

    sums: np.ndarray
    company: dict[int, frozenset[int]]


class Pipeline:
    """Releases sums of data sets as training does, from the sampler to the mechanism."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        torch.manual_seed(0)  # Of a model that everybody may know.
        self._model = Classifier().eval()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._descent = Descent(
            model=self._model,
            optimizer=ZOOptimizer(trained, directions=DIRECTIONS["rademacher"], seed=0, lr=0.1),
            method=plan.method,
            planned_steps=STEPS,
        )
        self._state = ModelState(self._model, moving=trained)
        self._collator = LogicalBatchCollator(
            collate=collate,
            micro_batch_size=plan.micro_batch_size,
            padded_lengths=PADDED_LENGTHS if plan.padded else (),
        )

    def release(self, rows: Sequence[Any], keys: Sequence[int]) -> Released:
        """Return what is released of a batch of all units. Each row has a key of its own."""
        plan, data, board, company = self._plan, Rows(rows), {}, {}
        column = None if plan.max_rows is None else "user"
        grouped = Units(num_rows=len(rows))
        if column is not None:
            grouped = Units.from_column(data, column, max_rows=plan.max_rows)
        firsts = [n if grouped.members is None else grouped.members[n][0] for n in range(len(grouped))]
        owners = [keys[first] % plan.num_processes for first in firsts]  # Drawn, and the same in both data sets.
        for rank in reversed(range(plan.num_processes)):
            processes = Simulated(rank, plan.num_processes, board) if plan.num_processes > 1 else SINGLE_PROCESS
            own = None if plan.shares_points else [unit for unit, owner in enumerate(owners) if owner == rank]
            sampler = PoissonBatchSampler(units=grouped, sampling_rate=1.0, own_units=own)
            drawn = [replace(one, key=keys[one.row]) for one in next(iter(sampler))] if len(grouped) else []
            fetched = SealedRows(data, dropped_column=column).__getitems__(drawn)
            batch = self._collator(fetched)["batch"]
            for micro_batch in batch.micro_batches:
                together = frozenset(row.key for row in micro_batch.rows)
                company |= dict.fromkeys(together, together)
            released = self._release_batch(batch, processes)
        return Released(sums=np.array(released, dtype=object), company=company)

    def _release_batch(self, batch: LogicalBatch, processes: Processes) -> tuple[int, ...]:
        estimate = assemble_estimate(
            self._model,
            processes,
            loss=OddLoss(leak=self._plan.leak),
            collator=self._collator,
            prepare=lambda inputs: inputs,
            device=torch.device("cpu"),
            state=self._state,
            capacity=1000 if self._plan.shares_points else None,
        )
        with self._descent.walk(0) as walk:
            losses = [estimate.evaluate(stop, self._model, batch) for stop in walk]
            coefficients = estimate.coefficients(losses, batch, self._descent.estimator(0))
        return self._plan.method.mechanism.release(coefficients, processes).integers
