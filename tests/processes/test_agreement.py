"""What processes must share: they begin at the same weights, and are told where they differ."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_dpzo.distributed.checksums import checksum
from hf_dpzo.distributed.processes import get_processes
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.trainer import trainer as trainer_module

from support.models import classifier, with_lora
from support.processes import ROWS, Here
from support.rows import labelled_rows
from support.runs import fingerprint, short_args, train
from support.stops import Drift


def weights_before_and_after(here: Here, folder: Path) -> tuple[str, str]:
    base = classifier()
    torch.manual_seed(here.rank)
    model = with_lora(base)
    before = fingerprint_values([p for p in model.parameters() if p.requires_grad])
    return before, fingerprint(train(folder, model=model))


def test_initial_weights_are_those_of_the_first_process(pair, tmp_path):
    (before, after), (other_before, other_after) = pair.each(weights_before_and_after, tmp_path)
    assert before != other_before
    assert after == other_after


def different_model(rank: int) -> dict:
    torch.manual_seed(rank)
    return {"model": with_lora(classifier())}


def different_plan(rank: int) -> dict:
    return {"max_steps": 4 + rank}


def different_loop(rank: int) -> dict:
    return {"logging_steps": 1 + rank}


def swapped_rows(rank: int) -> dict:
    order = list(range(ROWS))
    order[20 : 20 + 2] = [21, 20][:: 1 if rank else -1]
    return {"rows": labelled_rows(ROWS).select(order)}


def different_order(rank: int) -> dict:
    return {"rows": labelled_rows(ROWS).shuffle(seed=rank)}


def different_rows(rank: int) -> dict:
    return {"rows": labelled_rows(ROWS, seed=rank)}


def generated_rows(rank: int) -> dict:
    """Rows that have one fingerprint, as those of one generator that reads another file on each host."""
    order = [*range(rank, ROWS), *range(rank)]
    generate = functools.partial(read_rows, order)
    cache = tempfile.mkdtemp()
    return {"rows": Dataset.from_generator(generate, cache_dir=cache, fingerprint="the same")}


def read_rows(order):
    for number in order:
        yield labelled_rows(ROWS)[number]


class ListsOfNumpy(torch.utils.data.Dataset):
    """Rows whose lists hold numbers of NumPy, in an order of this host's own."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict:
        row = labelled_rows(ROWS)[(index + self.shift) % ROWS]
        return {**row, "input_ids": list(np.array(row["input_ids"]))}


def numpy_rows(rank: int) -> dict:
    return {"rows": ListsOfNumpy(rank)}


class Unknown(ListsOfNumpy):
    """Rows with a value that says nothing of its content."""

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "read": lambda: index}


def unknown_rows(rank: int) -> dict:
    return {"rows": Unknown(0)}


def refused(here: Here, differing, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        train(folder, **differing(here.rank))
    return str(error.value)


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        (different_model, "processes: 2 were launched, and they do not train the same"),
        (different_plan, "args: the 2 processes do not have the same "),
        (different_loop, "args: the 2 processes do not have the same "),
        (swapped_rows, "train_dataset: the 2 processes do not hold the same rows in the same order"),
        (different_order, "train_dataset: the 2 processes do not hold the same rows in the same order"),
        (different_rows, "train_dataset: the 2 processes do not hold the same rows in the same order"),
        (generated_rows, "train_dataset: the 2 processes do not hold the same rows in the same order"),
        (numpy_rows, "train_dataset: the 2 processes do not hold the same rows in the same order"),
        (unknown_rows, "train_dataset: its rows hold values that can not be compared between processes"),
    ],
)
def test_processes_that_differ_are_refused_in_each_of_them(differing, message, pair, tmp_path):
    assert all(said.startswith(message) for said in pair.each(refused, differing, tmp_path))
    assert not (tmp_path / "trajectory.zo").exists()


def stopped_by_drift(here: Here, every: int, folder: Path) -> str:
    here.patch.setattr(trainer_module, "CHECKED_EVERY", every)
    with pytest.raises(RuntimeError) as error:
        train(folder, callbacks=[Drift(here.rank == 1, after=2)])
    return str(error.value)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (1, "step=2: the 2 processes no longer hold the same weights"),
        (100, "model: something other than a step has changed what is trained"),
    ],
    ids=["compared in each step", "compared by each process with itself"],
)
def test_weights_that_drift_in_one_process_stop_the_run_in_each(every, message, pair, tmp_path):
    assert all(said.startswith(message) for said in pair.each(stopped_by_drift, every, tmp_path))


def test_checksum_sees_bits_anywhere():
    tensors = [torch.randn(3), torch.randn(1_500_001), torch.randn(5, 5), torch.randn(7, dtype=torch.float64)]
    before = checksum(tensors)
    assert checksum([one.clone() for one in tensors]) == before
    words = [one.view(-1).view(torch.int32) for one in tensors]
    places = [(0, 0), (1, 1_500_000), (1, 16_384), (1, 16_385), (1, 1_048_577), (2, 24), (3, 13)]
    for bit in (0, 15, 31):
        flip = -(2**31) if bit == 31 else 1 << bit
        for some in (*[[place] for place in places], places, places[1:3], places[2:4]):
            for tensor, place in some:
                words[tensor][place] ^= flip
            assert checksum(tensors) != before, (bit, some)
            for tensor, place in some:
                words[tensor][place] ^= flip
    assert checksum(tensors) == before
    assert checksum(tensors[::-1]) != before


def errors_of_the_first_process(here: Here, folder: Path) -> list[str]:
    short_args(folder)
    group, said = get_processes(torch.device("cpu")), []

    class Odd(Exception):
        """Can not be sent: it is no module's own."""

    def failing(kind):
        def make():
            raise kind("why")

        return make

    for kind in (OSError, Odd, KeyboardInterrupt):
        try:
            group.run_on_first(failing(kind))
        except BaseException as error:
            said.append(f"{type(error).__name__}: {error}")
    with pytest.raises(Exception, match="pickle"):
        group.run_on_first(lambda: lambda: None)
    return said


def test_errors_of_the_first_process_reach_the_others_whatever_they_are(pair, tmp_path):
    expected = ["OSError: why", "RuntimeError: Odd: why", "KeyboardInterrupt: why"]
    assert pair.each(errors_of_the_first_process, tmp_path) == [expected] * 2


def resumed_from_nothing(here: Here, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        train(folder, resume=True)
    return str(error.value)


def test_resuming_what_is_not_there_fails_in_each_process(pair, tmp_path):
    assert all("holds no log of a run" in said for said in pair.each(resumed_from_nothing, tmp_path / "none"))
