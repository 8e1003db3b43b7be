"""The log: what it holds, how it is damaged, and what its readers notice."""

import json
import math
from dataclasses import replace

import pytest

from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import LOG_FILE, MAGIC, Trajectory
from hf_dpzo.trajectory.records import RecordLayout
from hf_dpzo.trajectory.writer import TrajectoryWriter, acquire_lock

from support.logs import HEADER, record


SIZE = 40 + 8 + 16


@pytest.fixture
def log(tmp_path):
    path = tmp_path / LOG_FILE
    writer = TrajectoryWriter.create(path, HEADER)
    for step in range(5):
        writer.append(record(step))
    writer.close()
    return path


def test_what_was_appended_is_read(log):
    found = Trajectory.read(log)
    assert found.header == HEADER
    assert list(found.records) == [record(step) for step in range(5)]
    assert found.torn_bytes == 0
    assert Trajectory.read(log.parent) == found


@pytest.mark.parametrize(("directions", "groups", "size"), [(1, 2, 64), (1, 1, 56), (16, 2, 184)])
def test_a_step_costs_this_many_bytes(directions, groups, size):
    assert (
        RecordLayout(num_directions=directions, num_groups=groups).record_size
        == 40 + 8 * groups + 8 * directions
        == size
    )


def test_void_steps_are_distinguished_from_others(tmp_path):
    writer = TrajectoryWriter.create(tmp_path / LOG_FILE, HEADER)
    writer.append(record(0, integers=(0, 0), void=True))
    writer.append(record(1, integers=(0, 0)))
    writer.close()
    assert [one.void for one in Trajectory.read(tmp_path).records] == [True, False]


@pytest.mark.parametrize("lost", range(1, SIZE))
def test_a_torn_record_is_recognized_wherever_it_was_torn(log, lost):
    data = log.read_bytes()
    log.write_bytes(data[:-lost])
    found = Trajectory.read(log)
    assert (len(found.records), found.torn_bytes) == (4, SIZE - lost)


def test_a_torn_record_is_written_over(log):
    log.write_bytes(log.read_bytes()[:-10])
    writer = TrajectoryWriter(log, Trajectory.read(log))
    writer.append(replace(record(4, void=True), integers=(0,) * len(record(4).integers)))
    writer.close()
    assert [one.void for one in Trajectory.read(log).records] == [False] * 4 + [True]
    assert Trajectory.read(log).torn_bytes == 0


def test_every_changed_byte_is_noticed(log):
    """In the header, or in any record but the last, which counts as torn."""
    data = log.read_bytes()
    for place in range(0, len(data), 7):
        log.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if place >= len(data) - SIZE:
            assert (len(Trajectory.read(log).records), Trajectory.read(log).torn_bytes) == (4, SIZE)
        else:
            with pytest.raises(TrajectoryError):
                Trajectory.read(log)


def test_dropped_repeated_and_exchanged_records_are_noticed(log):
    data = log.read_bytes()
    start = len(data) - 5 * SIZE
    pieces = [data[start + SIZE * i : start + SIZE * (i + 1)] for i in range(5)]
    for order in ([0, 2, 3, 4], [0, 0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [1, 2, 3, 4]):
        log.write_bytes(data[:start] + b"".join(pieces[i] for i in order))
        with pytest.raises(TrajectoryError, match=r"record \d is damaged"):
            Trajectory.read(log)


def test_records_of_another_log_do_not_fit(log, tmp_path):
    other = TrajectoryWriter.create(tmp_path / "other.zo", {**HEADER, "method": {**HEADER["method"], "name": "zoso"}})
    for step in range(3):
        other.append(record(step))
    other.close()
    data = log.read_bytes()
    foreign = (tmp_path / "other.zo").read_bytes()[-2 * SIZE :]
    log.write_bytes(data[: -2 * SIZE] + foreign)
    with pytest.raises(TrajectoryError, match="record 3 is damaged"):
        Trajectory.read(log)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no log",
        MAGIC,
        MAGIC + b"\xff\xff\xff\xff" + b"x" * 100,
        MAGIC + b"\x10\x00\x00\x00" + b"{}" * 30,
        MAGIC.replace(b"1", b"2") + b"\x02\x00\x00\x00{}",
    ],
)
def test_files_that_are_no_log_get_one_sentence(tmp_path, data):
    (tmp_path / LOG_FILE).write_bytes(data)
    with pytest.raises(TrajectoryError, match=r"it should begin with|its header is damaged"):
        Trajectory.read(tmp_path)


@pytest.mark.parametrize("count", [0, -1, 10**9, True, 2.0, "2", None])
def test_no_unreadable_log_is_written(tmp_path, count):
    with pytest.raises(TrajectoryError, match=r"num_directions=.*: (type|minimum|maximum)"):
        TrajectoryWriter.create(tmp_path / LOG_FILE, {**HEADER, "num_directions": count})
    with pytest.raises(TrajectoryError, match=r"max_steps=10000000: a log of 64 MiB.* holds 10485\d\d of these steps"):
        TrajectoryWriter.create(tmp_path / LOG_FILE, {**HEADER, "plan": {**HEADER["plan"], "steps": 10**7}})
    assert not (tmp_path / LOG_FILE).exists()


@pytest.mark.parametrize(
    "changes", [{"learning_rates": (math.nan,)}, {"learning_rates": (math.inf,)}, {"smoothing": math.nan}]
)
def test_steps_without_finite_numbers_are_not_logged(log, changes):
    before, writer = log.read_bytes(), TrajectoryWriter(log, Trajectory.read(log))
    with pytest.raises(ValueError, match="step 5 can not take it; correct the schedule"):
        writer.append(record(5, **changes))
    writer.close()
    assert log.read_bytes() == before


def test_steps_are_appended_in_order(log):
    writer = TrajectoryWriter(log, Trajectory.read(log))
    with pytest.raises(RuntimeError, match="the log expects step 5"):
        writer.append(record(7))
    writer.close()


def test_a_log_has_one_owner(log):
    first = acquire_lock(log)
    with pytest.raises(TrajectoryError, match="another process writes this log"):
        acquire_lock(log)
    first.release()
    acquire_lock(log).release()


def test_appended_records_are_on_disk_before_append_returns(log, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(log.stat().st_size))
    before = log.stat().st_size
    writer = TrajectoryWriter(log, Trajectory.read(log))
    writer.append(record(5))
    assert synced == [before + SIZE]
    writer.close()


def test_what_differs_is_named():
    there = {"method": {"clip_norm": 1.0, "name": "dpzero"}, "groups": [1, 2], "adapter": None}
    here = {"method": {"clip_norm": 1.0, "name": "dpzo"}, "groups": [1], "adapter": {"seed": 1}}
    assert compare_json(there, here) == [
        'adapter=null there and {"seed": 1} here',
        "groups=[1, 2] there and [1] here",
        'method.name="dpzero" there and "dpzo" here',
    ]
    assert compare_json(there, json.loads(json.dumps(there))) == []
