"""The probe points of a step, spread over processes (`parallel=points`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TrainerCallback

from hf_dpzo.data.collation import LogicalBatch, MicroBatch
from hf_dpzo.data.sampling import BroadcastBatchSampler, DrawnRow, FetchedRow, batch_capacity
from hf_dpzo.distributed.processes import DistributedProcesses, get_processes
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian
from hf_dpzo.step.point_parallel import PointParallelEstimate
from hf_dpzo.zo.spsa import ForwardDifference
from hf_dpzo.zo.walk import Stop

from support.models import classifier, with_lora
from support.processes import ROWS, Here, alone, frozen
from support.rows import labelled_rows
from support.runs import fingerprint, released, short_args, train
from support.sweeps import slow


CASES = {
    "adapter": {},
    "all parameters": {"learning_rate": 1e-3},
    "directions": {"method": "aggzo", "num_directions": 3, "difference": "forward"},
    "adam": {"update": "adam"},
}
SPREAD = {"padded_lengths": None, "parallel": "points"}


def trained(here: Here, case: str, folder: Path) -> str:
    # What the others draw is not used.
    frozen(Here(rank=0, size=1, patch=here.patch), seed=here.rank)
    model = classifier() if case == "all parameters" else with_lora(classifier())
    return fingerprint(train(folder, model=model, **CASES[case], **SPREAD))


@pytest.mark.parametrize("size", [2, *slow(3, 4)])
@pytest.mark.parametrize("case", CASES)
def test_points_may_be_spread_over_any_number_of_processes(case, size, launched, tmp_path):
    """With the same integers and bits as in one process; micro-batches too are those of one process."""
    one = alone(trained, case, tmp_path / "one")
    assert launched[size].each(trained, case, tmp_path / "several") == [one] * size
    assert released(tmp_path / "one") == released(tmp_path / "several")


class Batches(list):
    """A sampler of given batches."""

    def draw_arrays(self):
        return (np.array([[r.unit, r.row, r.key] for r in rows], dtype=np.int64).reshape(-1, 3) for rows in self)


def drawn(*rows: int) -> list[DrawnRow]:
    return [DrawnRow(unit=row % 3, row=row, slot=place) for place, row in enumerate(rows)]


def batches_seen(here: Here, folder: Path) -> tuple[list, list]:
    """The batches of this process, and the shapes of what is sent."""
    short_args(folder)
    group, shapes, pack = get_processes(torch.device("cpu")), [], DistributedProcesses._to_tensor
    here.patch.setattr(
        DistributedProcesses, "_to_tensor", lambda group, values: shapes.append(values.shape) or pack(group, values)
    )
    own = [drawn(here.rank), drawn(), drawn(7 + here.rank, 4, 8), drawn(*range(9))]
    return list(BroadcastBatchSampler(Batches(own), group, capacity=5)), shapes


def test_all_processes_see_the_batch_of_the_first_one(pair, tmp_path):
    (first, shapes), (second, others) = pair.each(batches_seen, tmp_path)
    assert first == second == [drawn(0), drawn(), drawn(7, 4, 8), drawn(0, 1, 2, 3, 4)]
    assert shapes == others == [(5, 3)] * 4, "how many rows there are must not show"


# The second process could not fetch the row at place 1, and the first one not the one at place 4.
PLACES = [[2, 0, 1], [4, 2, 0]]


def estimated(here: Here, folder: Path) -> tuple[list[int], torch.Tensor]:
    """The points that this process has evaluated, and the coefficients that it knows."""
    short_args(folder)
    calls: list[int] = []
    estimate = PointParallelEstimate(
        losses=lambda model, batch: calls.append(stop.index) or torch.tensor([10.0 + one for one in batch.row_slots]),
        processes=get_processes(torch.device("cpu")),
        capacity=6,
    )
    estimator, losses = ForwardDifference(smoothing=1.0, num_directions=2), []
    rows = tuple(FetchedRow(unit=place // 2, row=None, slot=place) for place in PLACES[here.rank])
    batch = LogicalBatch(micro_batches=(MicroBatch(rows=rows, size=3, inputs=None),), num_units=3)
    for index, point in enumerate(estimator.points):
        stop = Stop(index=index, points=(point,))
        losses.append((1 + index) * estimate.evaluate(stop, None, batch))
    return calls, estimate.coefficients(losses, batch, estimator)


def test_processes_take_turns_and_put_losses_where_their_rows_were_drawn(pair, tmp_path):
    (calls, coefficients), (other_calls, nothing) = pair.each(estimated, tmp_path)
    assert (calls, other_calls) == ([0, 2], [1])
    # Place 1, of which the second process has no row, counts as zero beside place 0 in their unit's mean.
    halves = torch.tensor([[10 / 2 / 2, 2 * (10 + 11) / 2 / 2], [12 / 2, 2 * 12 / 2], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(coefficients, halves, rtol=0, atol=1e-12)
    assert nothing.shape == (0, 2)


class Failing(torch.utils.data.Dataset):
    """Users of two rows each, of which one row is broken from when training begins."""

    def __init__(self, broken: bool) -> None:
        self._broken, self.armed = broken, False
        self._rows = labelled_rows(ROWS).add_column("user", [f"u{i // 2}" for i in range(ROWS)]).to_list()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, place: int) -> dict:
        if self._broken and place == 7 and self.armed:
            raise OSError
        return self._rows[place]


class Arm(TrainerCallback):
    """Breaks the rows when training begins."""

    def __init__(self, rows: Failing) -> None:
        self._rows = rows

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._rows.armed = True


def sums_of_a_step(here: Here, broken: bool, folder: Path) -> list[list[int]]:
    """What noise would be added to, where a row is broken in the second process alone."""
    seen: list[list[int]] = []
    here.patch.setattr(BernoulliSampler, "draw", lambda mask: np.arange(mask.size) < 8)
    here.patch.setattr(DiscreteGaussian, "add", lambda noise, values: seen.append(list(values)) or values)
    rows = Failing(broken and here.rank == 1)
    unit = {"privacy_unit_column": "user", "max_rows_per_unit": 2, "expected_batch_size": 2}
    told = {"parallel": "points", "max_steps": 1, "clip_norm": 1e4}
    train(folder, rows=rows, callbacks=[Arm(rows)], **unit, **told)
    return seen


def test_a_row_that_one_process_fails_on_moves_no_other_row(pair, tmp_path):
    """Its losses are then not finite."""
    sums = {broken: pair.each(sums_of_a_step, broken, tmp_path / str(broken))[0] for broken in (False, True)}
    moved = abs(sums[True][0][0] - sums[False][0][0])
    assert 0 < moved <= 2**40, "one unit counts for less, and no other one for anything else"


def test_room_is_more_than_any_batch_needs():
    for mean in (1, 8, 64, 1000):
        assert stats.poisson.sf(batch_capacity(mean), mean) < 1e-17
        assert batch_capacity(mean) < 54 * mean


def trained_on_nothing(here: Here, folder: Path) -> str:
    here.patch.setattr(BernoulliSampler, "draw", lambda mask: np.zeros(mask.size, dtype=bool))
    return fingerprint(train(folder, parallel="points"))


def test_empty_batches_pass_where_points_are_spread(pair, tmp_path):
    assert len(set(pair.each(trained_on_nothing, tmp_path))) == 1


def test_points_are_spread_or_joined_in_a_pass_but_not_both(make_args):
    with pytest.raises(ValueError, match=r"^points_per_pass=2: points are spread over processes already; "):
        make_args(points_per_pass=2, parallel="points")
