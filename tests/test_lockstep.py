"""Runs of models of which each process holds a part: the same integers, the same bits, and no process waits."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import classifier, few_public_rows, labelled_rows, with_lora
from several import ended, in_each
from test_processes import ROWS, frozen
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.initial import values_fingerprint
from hf_dpzo.noise import BernoulliMask
from hf_dpzo.replay import replay_onto


def split(model: torch.nn.Module, mesh=None) -> torch.nn.Module:
    """Each layer for itself, and the rest with the root."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture
def run(make_args, tokenizer, tmp_path):
    """Trains a model in this process, which is one of those of the run."""

    def trained(make, *, folder="run", resume=False, callbacks=(), eval_dataset=None, **changes) -> ZOTrainer:
        fixed = {"padded_lengths": [16], "max_steps": 4, "output_dir": str(tmp_path / folder)}
        args = make_args(**fixed | changes)  # Which joins the processes.
        trainer = ZOTrainer(
            model=make(),
            args=args,
            train_dataset=labelled_rows(ROWS),
            eval_dataset=eval_dataset,
            data_collator=DataCollatorWithPadding(tokenizer),
            probe_rows=few_public_rows(),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return trained


def released(folder: Path) -> list[tuple[int, ...]]:
    return [record.integers for record in Trajectory.read(folder).records]


def fingerprint(trainer: ZOTrainer) -> str:
    return values_fingerprint(p for p in trainer.model.parameters() if p.requires_grad)


def whole_model(lora: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return with_lora(classifier()) if lora else classifier()


@pytest.mark.parametrize("lora", [False, True], ids=["all", "adapter"])
@pytest.mark.parametrize("settings", [{}, {"num_directions": 2, "method": "aggzo"}], ids=["one", "two"])
def test_a_split_model_releases_the_same_integers_and_ends_at_the_same_bits(lora, settings, run, tmp_path):
    def work(rank: int, size: int) -> str:
        frozen(rank, size)
        make = (lambda: whole_model(lora)) if size == 1 else (lambda: split(whole_model(lora)))
        trainer = run(make, folder=f"run-{size}", save_strategy="no", **settings)
        if size > 1:
            assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        trainer.save_model()
        return fingerprint(trainer)

    found = {size: set(in_each(size, lambda rank, size=size: work(rank, size))) for size in (1, 2, 3)}
    assert found[1] == found[2] == found[3]
    assert len(found[1]) == 1
    logs = [released(tmp_path / f"run-{size}") for size in (1, 2, 3)]
    assert len(logs[0]) == 4
    assert logs[0] == logs[1] == logs[2]
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    saved = {(tmp_path / f"run-{size}" / name).read_bytes() for size in (1, 2, 3)}
    assert len(saved) == 1


@pytest.mark.parametrize("where", ["embed_tokens", "norm", "layers.1"])
def test_a_row_that_fails_in_one_process_counts_for_nothing_and_holds_up_nobody(where, run, tmp_path):
    def failing() -> torch.nn.Module:
        model = whole_model(lora=False)
        bad = [row["input_ids"] for row in labelled_rows(ROWS).select(range(0, ROWS, 5))]
        seen = []

        def look(module: torch.nn.Module, args: tuple) -> None:
            seen.append(any([i for i in ids if i != 0] in bad for ids in args[0].tolist()))

        def fail(module: torch.nn.Module, args: tuple) -> None:
            if seen[-1]:
                raise RuntimeError("a row that this model can not read")

        model.model.embed_tokens.register_forward_pre_hook(look)

        model.model.get_submodule(where).register_forward_pre_hook(fail)
        return model

    def work(rank: int, size: int) -> str:
        frozen(rank, size)
        make = failing if size == 1 else (lambda: split(failing()))
        return fingerprint(run(make, folder=f"run-{size}", save_strategy="no", per_device_train_batch_size=4))

    found = {size: set(in_each(size, lambda rank, size=size: work(rank, size))) for size in (1, 2)}
    assert found[1] == found[2]
    without = in_each(1, lambda rank: (frozen(rank, 1), fingerprint(run(lambda: whole_model(False), folder="all")))[1])
    assert set(without) != found[1], "no row failed"


def test_processes_without_rows_join_in(run, tmp_path):
    def work(rank: int) -> str:
        BernoulliMask.draw = lambda mask: np.arange(mask.size) < 3 * (rank == 1)
        return fingerprint(run(lambda: split(whole_model(False)), save_strategy="no"))

    assert len(set(in_each(3, work))) == 1
    assert len(released(tmp_path / "run")) == 4


def test_an_evaluated_and_saved_run_goes_on_with_another_number_of_processes(run, tmp_path):
    rows = labelled_rows(ROWS)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}

    def begun(rank: int) -> None:
        frozen(rank, 2)

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **rest):
                if state.global_step == 2 and rank == 1:
                    os._exit(1)

        run(lambda: split(whole_model(False)), eval_dataset=rows.select(range(7)), callbacks=[Stop()], **settings)

    first = ended(2, begun, timeout=120)
    assert any(one.killed or one.error for one in first)
    assert 2 <= len(released(tmp_path / "run")) <= 3

    def resumed(rank: int) -> tuple[str, int]:
        frozen(rank, 3, seed=1)
        trainer = run(
            lambda: split(whole_model(False)), resume=True, eval_dataset=rows.select(range(7)), **settings
        )
        return fingerprint(trainer), len([one for one in trainer.state.log_history if "eval_loss" in one])

    (found,) = {one for one, _ in in_each(3, resumed, timeout=120)}
    model = whole_model(False)
    replay_onto(model, Trajectory.read(tmp_path / "run"))
    assert values_fingerprint(model.parameters()) == found
