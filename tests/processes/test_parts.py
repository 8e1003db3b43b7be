"""A run that goes on with another number of processes says so; keys and cuts are the same in all processes."""

import json
from contextlib import suppress
from pathlib import Path

from transformers import TrainerCallback

from hf_dpzo.data.sampling import BroadcastBatchSampler, PoissonBatchSampler
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import get_processes
from hf_dpzo.trajectory.parts import PARTS_FILE

from support.processes import Here, alone
from support.runs import short_args, train


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def begun(here: Here, folder: Path) -> None:
    with suppress(KeyboardInterrupt):
        train(folder, callbacks=[Interrupt()])


def finished(here: Here, folder: Path) -> None:
    train(folder, resume=True).save_model()


def stated(folder: Path) -> list[tuple[int, int]]:
    statement = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    return [(part["first_step"], part["processes"]) for part in statement.get("parts", [])]


def test_a_run_that_goes_on_with_another_number_of_processes_says_so(pair, tmp_path):
    alone(begun, tmp_path / "one, then two")
    pair.each(finished, tmp_path / "one, then two")
    assert stated(tmp_path / "one, then two") == [(0, 1), (2, 2)]
    pair.each(begun, tmp_path / "two, then one")
    alone(finished, tmp_path / "two, then one")
    assert stated(tmp_path / "two, then one") == [(0, 2), (2, 1)]
    pair.each(begun, tmp_path / "two")
    pair.each(finished, tmp_path / "two")
    assert stated(tmp_path / "two") == []
    assert not (tmp_path / "two" / PARTS_FILE).exists()


def drawn(here: Here, folder: Path) -> list[tuple[int, int, int, int]]:
    processes = get_processes(short_args(folder).device)
    sampler = PoissonBatchSampler(units=Units(num_rows=40), sampling_rate=0.5)
    batches = BroadcastBatchSampler(sampler, processes, capacity=200)
    return [(row.unit, row.row, row.slot, row.key) for batch in batches for row in batch]


def test_processes_that_share_points_have_the_same_rows_with_the_same_keys(pair, tmp_path):
    """So they cut them alike, and a row moves no more rows than in one process."""
    first, second = pair.each(drawn, tmp_path)
    assert first == second
    assert len({key for *_, key in first}) == len(first) > 10
