"""Several processes share the rows out: one batch, one release, one set of weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_dpzo.data.sampling import PoissonBatchSampler, build_batch_sampler
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import SINGLE_PROCESS, DistributedProcesses, get_processes
from hf_dpzo.privacy.mechanism import ClippedSum, GaussianSum, Mechanism, PlainMean
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian

from support.activated import activated_rows, train_activated
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


def model_of(case: str) -> torch.nn.Module:
    return classifier() if case == "all parameters" else with_lora(classifier())


def trained(here: Here, case: str, folder: Path) -> str:
    frozen(here)
    return fingerprint(train(folder, model=model_of(case), **CASES[case]))


@pytest.mark.parametrize("size", [2, *slow(3, 4)])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_processes_releases_the_same_integers_and_ends_at_the_same_bits(case, size, launched, tmp_path):
    one = alone(trained, case, tmp_path / "one")
    assert launched[size].each(trained, case, tmp_path / "several") == [one] * size
    integers = released(tmp_path / "one")
    assert released(tmp_path / "several") == integers
    assert len(integers) == 4 and len(set(integers)) > 1


def trained_activated(here: Here, folder: Path) -> str:
    """Of an activated adapter, on rows of which two never activate it."""
    frozen(here)
    return fingerprint(train_activated(folder, rows=activated_rows(ROWS, without=frozenset([5, 12]))))


def test_several_processes_train_an_activated_adapter_as_one_does(pair, tmp_path):
    one = alone(trained_activated, tmp_path / "one")
    assert pair.each(trained_activated, tmp_path / "several") == [one] * 2
    assert released(tmp_path / "one") == released(tmp_path / "several")


def trained_on_users(here: Here, folder: Path) -> str:
    frozen(here, units=10)
    rows = labelled_rows(ROWS).add_column("user", [f"u{i % 10}" for i in range(ROWS)])
    unit = {"privacy_unit_column": "user", "max_rows_per_unit": 4, "expected_batch_size": 2}
    return fingerprint(train(folder, rows=rows, **unit))


@pytest.mark.parametrize("size", [2, *slow(3)])
def test_users_are_drawn_by_one_process_each(size, launched, tmp_path):
    one = alone(trained_on_users, tmp_path / "one")
    assert launched[size].each(trained_on_users, tmp_path / "several") == [one] * size
    assert released(tmp_path / "one") == released(tmp_path / "several")


# ---- Batches ----


def drawn_by_all(here: Here, folder: Path) -> list[list[int]]:
    processes = get_processes(short_args(folder).device)
    samplers = [build_batch_sampler(Units(num_rows=99), 1.0, processes, capacity=None) for _ in range(4)]
    return [[one.row for one in next(iter(sampler))] for sampler in samplers]


def test_each_unit_belongs_to_one_process_and_to_another_one_in_each_run(pair, tmp_path):
    """Which one says nothing about the others: with turns, a row more would move all behind it to other batches."""
    first, second = pair.each(drawn_by_all, tmp_path)
    assert all(sorted([*one, *other]) == list(range(99)) for one, other in zip(first, second, strict=True))
    assert len({tuple(one) for one in first}) == 4
    assert all(20 < len(one) < 79 for one in first)  # Six standard deviations.


def test_what_processes_draw_together_is_one_poisson_batch():
    """Sizes are binomial, and two rows join independently, whether they are of one share or of two."""
    rate, steps, size = 0.3, 4000, 3
    samplers = [
        PoissonBatchSampler(units=Units(num_rows=9), sampling_rate=rate, own_units=range(rank, 9, size))
        for rank in range(size)
    ]
    joined = np.zeros((steps, 9))
    for step in range(steps):
        for sampler in samplers:
            joined[step, [one.row for one in next(iter(sampler))]] = 1
    spread = 5 * np.sqrt(rate * (1 - rate) / steps)
    assert np.abs(joined.mean(axis=0) - rate).max() < spread
    assert all(np.abs(joined.mean(axis=0) - scale * rate).min() > spread for scale in (2 / 3, 3 / 2))
    correlation = np.corrcoef(joined.T) - np.eye(9)
    assert np.abs(correlation).max() < 5 / np.sqrt(steps)
    assert joined.sum(axis=1).var() == pytest.approx(9 * rate * (1 - rate), rel=0.15)


def batches_after_a_run(here: Here, folder: Path) -> list[list[int]]:
    sampler = PoissonBatchSampler(
        units=Units(num_rows=200), sampling_rate=0.1, own_units=range(here.rank, 200, here.size)
    )
    train(folder, max_steps=1)
    return [[one.row // 2 for one in batch] for batch in sampler]


def test_no_process_repeats_anothers_draws(pair, tmp_path):
    """Each draws from its own operating system, after a fork too."""
    first, second = pair.each(batches_after_a_run, tmp_path)
    assert first != second


def trained_while_some_have_rows(here: Here, who: str, folder: Path) -> str:
    steps = iter(range(1000))
    last = here.size - 1

    def draw(mask: BernoulliSampler) -> np.ndarray:
        step = next(steps)
        joins = {"nobody": False, "the last one": here.rank == last, "the first one": here.rank == 0}
        return np.full(mask.size, joins.get(who, (here.rank + step) % 2 == 0))

    here.patch.setattr(BernoulliSampler, "draw", draw)
    return fingerprint(train(folder, per_device_train_batch_size=2))


@pytest.mark.parametrize("size", [2, *slow(3)])
@pytest.mark.parametrize("who", ["nobody", "the last one", "the first one", "alternating"])
def test_empty_and_uneven_shares_do_not_hang(who, size, launched, tmp_path):
    assert len(set(launched[size].each(trained_while_some_have_rows, who, tmp_path))) == 1
    assert len(released(tmp_path)) == 4


# ---- The release ----


def joined(folder: Path) -> DistributedProcesses:
    """The group of processes, as a trainer joins it."""
    short_args(folder)
    return get_processes(torch.device("cpu"))


def release(here: Here, folder: Path) -> tuple:
    """What this process sees of a sum, what it adds noise to, and what is released. It has as many rows as its rank."""
    group, drawn = joined(folder), []
    sums = group.reduce_sum(np.array([here.rank + 1, 2**61]))
    add = DiscreteGaussian.add
    here.patch.setattr(DiscreteGaussian, "add", lambda noise, values: drawn.append(values) or add(noise, values))
    mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    released = mechanism.release(torch.full((here.rank, 2), 0.25, dtype=torch.float64), group)
    return None if sums is None else sums.tolist(), drawn, released


@pytest.mark.parametrize(("size", "rows"), [(2, 1), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_the_first_process_alone_sees_the_sum_and_draws_noise_once(size, rows, launched, tmp_path):
    (sums, drawn, released), *others = launched[size].each(release, tmp_path)
    assert sums == [size * (size + 1) // 2, size * 2**61]
    assert drawn == [[rows * 2**38, rows * 2**38]]
    assert [other[:2] for other in others] == [(None, [])] * (size - 1)
    assert all(other[2] == released for other in others)


ROWS_OF_TWO = torch.tensor([[0.5, -0.25], [0.125, 0.5], [0.0, 0.75]], dtype=torch.float64)


def released_together(here: Here, mechanism: Mechanism, folder: Path):
    return mechanism.release(ROWS_OF_TWO[here.rank :: 2], joined(folder))


@pytest.mark.parametrize("mechanism", [ClippedSum(clip_norm=1.0, expected_batch_size=4), PlainMean()])
def test_without_noise_shares_make_the_release_of_the_whole_batch(mechanism, pair, tmp_path):
    assert pair.each(released_together, mechanism, tmp_path) == [mechanism.release(ROWS_OF_TWO, SINGLE_PROCESS)] * 2


def bytes_sent(here: Here, num_directions: int, folder: Path) -> list[int]:
    group, sent, pack = joined(folder), [], DistributedProcesses._to_tensor
    here.patch.setattr(
        DistributedProcesses, "_to_tensor", lambda group, values: sent.append(values.nbytes) or pack(group, values)
    )
    mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    mechanism.release(torch.zeros(1, num_directions), group)
    return sent


@pytest.mark.parametrize("num_directions", [1, 16])
def test_a_step_sends_eight_bytes_a_direction_twice(num_directions, pair, tmp_path):
    """Whatever the model's size: the sums to the first process, and the release back."""
    assert pair.each(bytes_sent, num_directions, tmp_path) == [[8 * num_directions] * 2] * 2
