"""`kill -9` at any instant: no step is lost, none is counted twice, and the weights are those of an independent replay.

Each run is a forked process, so that killing it is the real thing and starting it costs nothing.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.trajectory.checkpoints import CheckpointMark
from hf_dpzo.trajectory.log import LOG_FILE, MAGIC, Trajectory
from hf_dpzo.trajectory.writer import TrajectoryWriter, acquire_lock
from hf_dpzo.zo.optimizer import ZOOptimizer

from support.models import one_layer
from support.rows import few_public_rows, labelled_rows


STEPS, SMOOTHING = 12, 2.0**-6
WORD = bytes(range(256))


@pytest.fixture
def make_trainer(make_args, tokenizer, tmp_path):
    def make(folder: Path = tmp_path / "out") -> ZOTrainer:
        torch.manual_seed(0)
        return ZOTrainer(
            model=one_layer(),
            args=make_args(
                output_dir=str(folder),
                max_steps=STEPS,
                save_strategy="steps",
                save_steps=3,
                save_total_limit=2,
                weight_decay=0.0,
                smoothing=SMOOTHING,
                expected_batch_size=4,
            ),
            train_dataset=labelled_rows(10),
            data_collator=DataCollatorWithPadding(tokenizer),
            probe_rows=few_public_rows(),
        )

    return make


@pytest.fixture(scope="module")
def accounted() -> set[int]:
    """Of how many steps the accountants were asked."""
    return set()


@pytest.fixture(autouse=True)
def _remembered(make_trainer, tmp_path, accounted):
    """One run in this process: what accountants say is remembered, and children that are killed need not ask again."""
    if STEPS not in accounted:
        go_on(make_trainer, tmp_path / "first")
        accounted.add(STEPS)


def said_by(process: int) -> Path:
    return Path(tempfile.gettempdir()) / f"hf_dpzo-child-{process}"


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own; return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            work()
            status = 0
        except OSError as error:
            said_by(os.getpid()).write_text(str(error))
            status = 2
        finally:
            os._exit(status)
    return child


def outcome(child: int) -> tuple[int, str]:
    """How a process ended, and what it said."""
    _, status = os.waitpid(child, 0)
    said = said_by(child)
    text = said.read_text() if said.exists() else ""
    said.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), text


def independent_replay(path: Path, parameters: dict[str, np.ndarray]) -> int:
    """Replay a log of Rademacher directions and plain descent in NumPy alone; return how many steps it has.

    Nothing of the library is used: the file is taken apart by its description, and the signs are the bits of Philox.
    """
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    start = len(MAGIC) + 4
    header = json.loads(data[start : start + length])
    names = [name for group in header["groups"] for name in group["parameters"]]
    groups = [i for i, group in enumerate(header["groups"]) for _ in group["parameters"]]
    unit = header["method"]["clip_norm"] / 2**40 / header["method"]["expected_batch_size"]
    size, steps = 40 + 8 * len(header["groups"]) + 8, 0
    domain = int.from_bytes(b"hf_dpzo", "big")
    for begin in range(start + length + 32, len(data), size):
        step, _, smoothing, _, *rest = struct.unpack_from(f"<IIdQ{len(header['groups'])}dq", data, begin)
        rates, integer = rest[:-1], rest[-1]
        for index, name in enumerate(names):
            value = parameters[name].reshape(-1)
            key = np.array([header["directions"]["seed"], domain], dtype=np.uint64)
            counter = np.array([0, index, 0, step], dtype=np.uint64)
            words = np.random.Philox(key=key, counter=counter).random_raw(-(-value.size // 64))
            bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: value.size]
            signs = 1 - 2 * bits.astype(np.float32)
            for distance in (smoothing, -2 * smoothing, smoothing - rates[groups[index]] * integer * unit):
                value += signs * np.float32(distance)
        steps += 1
    return steps


def check(make_trainer, folder: Path) -> None:
    """The run is complete, and its weights are what the log says, whoever replays it."""
    trainer = make_trainer(folder)
    initial = {name: p.detach().numpy().copy() for name, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.budget.ledger) == trainer.state.global_step == STEPS
    assert independent_replay(folder / LOG_FILE, initial) == STEPS
    for name, parameter in trainer.model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), initial[name]), name


def go_on(make_trainer, folder: Path) -> None:
    make_trainer(folder).train(resume_from_checkpoint=(folder / LOG_FILE).exists())


def killed_at_random(make_trainer, folder: Path, kills: int, longest: float) -> None:
    """Start, kill, and start again, until it was killed `kills` times; what was on disk must stay."""
    draw, seen, done = random.SystemRandom(), b"", 0
    while done < kills:
        child = in_child(lambda: go_on(make_trainer, folder))
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status, said = outcome(child)
        assert status in (0, -signal.SIGKILL), (status, said)
        log = folder / LOG_FILE
        if log.exists():
            now = log.read_bytes()
            whole = len(now) - Trajectory.read(folder).torn_bytes
            assert now.startswith(seen), "a step was lost"
            seen = now[:whole]
        if status == 0:  # It was faster. Another run begins.
            check(make_trainer, folder)
            shutil.rmtree(folder)
            seen = b""
        done += status != 0


def duration(make_trainer, folder: Path) -> float:
    started = time.perf_counter()
    assert outcome(in_child(lambda: go_on(make_trainer, folder)))[0] == 0
    return time.perf_counter() - started


def test_killed_at_random_instants_nothing_is_lost(make_trainer, tmp_path):
    longest = duration(make_trainer, tmp_path / "timed")
    killed_at_random(make_trainer, tmp_path / "out", 3, longest)
    if (tmp_path / "out" / LOG_FILE).exists():
        check(make_trainer, tmp_path / "out")


@pytest.mark.slow
def test_killed_sixty_times_nothing_is_lost(make_trainer, tmp_path):
    longest = duration(make_trainer, tmp_path / "timed")
    for number in range(6):
        killed_at_random(make_trainer, tmp_path / f"out{number}", 10, longest)
        if (tmp_path / f"out{number}" / LOG_FILE).exists():
            check(make_trainer, tmp_path / f"out{number}")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inside_the_append(patch, count: int) -> None:
    """Half of a record is written."""
    append_whole = TrajectoryWriter.append

    def append(writer, record, **options):
        if record.step == count:
            writer._file.write(writer._layout.pack(record, writer._checksum)[:30])
            die()
        append_whole(writer, record, **options)

    patch.setattr(TrajectoryWriter, "append", append)


def inside_the_update(patch, count: int) -> None:
    """Some parameters have moved, and others have not."""
    add, calls = ZOOptimizer._move_, []

    def move(optimizer, step, *rest):
        calls.append(step)
        if step == count:
            parameters = optimizer.parameters()
            optimizer.directions.add_(parameters[0], index=0, step=step, weights={0: 1.0})
            die()
        add(optimizer, step, *rest)

    patch.setattr(ZOOptimizer, "_move_", move)


def inside_a_checkpoint(patch, count: int) -> None:
    """The weights are there, and half of the mark."""

    def save(mark, folder):
        (folder / "trajectory_checkpoint.json.new").write_text("{")
        die()

    patch.setattr(CheckpointMark, "save", save)


def inside_the_weights(patch, count: int) -> None:
    """Half of the weights are there."""
    save = ZOTrainer.save_model

    def save_model(trainer, output_dir=None, _internal_call=False):
        save(trainer, output_dir, _internal_call)
        weights = Path(output_dir) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        die()

    patch.setattr(ZOTrainer, "save_model", save_model)


@pytest.mark.parametrize("place", [inside_the_append, inside_the_update, inside_a_checkpoint, inside_the_weights])
def test_killed_in_the_middle_of_something_nothing_is_lost(place, make_trainer, monkeypatch, tmp_path):
    folder = tmp_path / "out"
    for count in (3, 7):
        with monkeypatch.context() as patch:
            place(patch, count)
            assert outcome(in_child(lambda: go_on(make_trainer, folder)))[0] == -signal.SIGKILL
    check(make_trainer, folder)
    voids = sum(record.void for record in Trajectory.read(folder).records)
    assert voids == (2 if place is inside_the_append else 0)


# ---- Disks ----


def test_full_disk_ends_with_a_clear_error_and_an_intact_log(make_trainer, tmp_path):
    folder = tmp_path / "out"

    def train() -> None:
        trainer = make_trainer(folder)
        trainer.args.save_strategy = "no"
        opened = TrajectoryWriter.create.__func__

        def limited(kind, path, header):
            writer = opened(kind, path, header)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            size = path.stat().st_size + 5 * 64 + 20  # Five records, and a third of the sixth.
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return writer

        TrajectoryWriter.create = classmethod(limited)
        trainer.train()

    status, said = outcome(in_child(train))
    assert status == 2
    assert "step 5 could not be written (File too large); the 5 steps before it are safe: make room" in said
    log = Trajectory.read(folder)
    assert (len(log.records), log.torn_bytes) == (5, 20)
    check(make_trainer, folder)
    assert [record.void for record in Trajectory.read(folder).records] == [False] * 5 + [True] + [False] * 6


def test_read_only_folder_ends_with_a_clear_error(make_trainer):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)

    def train() -> None:
        trainer = make_trainer(folder)
        if os.geteuid() == 0:
            os.setuid(65534)  # Root may write anywhere.
        trainer.train()

    try:
        status, said = outcome(in_child(train))
        assert status == 2
        assert said.startswith(f"output_dir={folder}: the log of the run can not be written there (Permission denied)")
        assert not list(folder.iterdir())
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_two_processes_do_not_write_one_log(make_trainer, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        inside_the_update(patch, 3)
        outcome(in_child(lambda: go_on(make_trainer, folder)))
    lock = acquire_lock(folder / LOG_FILE)
    with pytest.raises(ValueError, match="another process writes this log"):
        make_trainer(folder).train(resume_from_checkpoint=True)
    lock.release()
    check(make_trainer, folder)
