"""Runs of models of which each process holds a part: the same integers, the same bits, and no process waits."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import TaskType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.models.checks import refuse_sharded
from hf_dpzo.models.fingerprints import values_fingerprint
from hf_dpzo.privacy.noise import BernoulliMask, DiscreteGaussian
from hf_dpzo.step.fsdp import FSDPLosses
from hf_dpzo.trajectory.replay import replay_onto
from hf_dpzo.verification.verify import verify

from support.models import causal_lm, classifier, with_lora
from support.processes import ROWS, ended, frozen, in_each
from support.rows import few_public_rows, labelled_rows


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

    def trained(
        make, *, folder="run", resume=False, callbacks=(), eval_dataset=None, rows=None, **changes
    ) -> ZOTrainer:
        fixed = {"padded_lengths": [16], "max_steps": 4, "output_dir": str(tmp_path / folder)}
        args = make_args(**fixed | changes)  # Which joins the processes.
        trainer = ZOTrainer(
            model=make(),
            args=args,
            train_dataset=labelled_rows(ROWS) if rows is None else rows,
            eval_dataset=eval_dataset,
            data_collator=(DataCollatorWithPadding if rows is None else DataCollatorForSeq2Seq)(tokenizer),
            probe_rows=few_public_rows() if rows is None else texts(2).to_list(),
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


def adapter_on_split_body() -> torch.nn.Module:
    """The head is left whole, for PEFT copies it."""
    torch.manual_seed(0)
    model = classifier()
    split(model.model)
    return with_lora(model)


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
        trainer = run(lambda: split(whole_model(False)), resume=True, eval_dataset=rows.select(range(7)), **settings)
        return fingerprint(trainer), len([one for one in trainer.state.log_history if "eval_loss" in one])

    (found,) = {one for one, _ in in_each(3, resumed, timeout=120)}
    model = whole_model(False)
    replay_onto(model, Trajectory.read(tmp_path / "run"))
    assert values_fingerprint(model.parameters()) == found


@pytest.mark.parametrize("lora", [False, True], ids=["all", "adapter"])
def test_a_model_that_transformers_splits_while_loading_ends_at_the_same_bits(lora, run, tmp_path):
    """An adapter that is added to it is whole in each process."""
    base = tmp_path / "base"
    causal_lm().save_pretrained(base)

    def made(**settings) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(base, **settings)
        torch.manual_seed(1)
        return with_lora(model, TaskType.CAUSAL_LM) if lora else model

    def work(rank: int, size: int) -> str:
        frozen(rank, size)
        settings = {} if size == 1 else {"distributed_config": DistributedConfig(fsdp_size=size)}
        saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
        trainer = run(lambda: made(**settings), folder=f"run-{size}", rows=texts(), **saving)
        split = [isinstance(p, DTensor) for p in trainer.model.parameters() if p.requires_grad == (not lora)]
        assert all(split) if size > 1 else not any(split)
        assert not lora or not any(isinstance(p, DTensor) for p in trainer.model.parameters() if p.requires_grad)
        trainer.save_model()
        return fingerprint(trainer)

    found = {size: set(in_each(size, lambda rank, size=size: work(rank, size))) for size in (1, 2)}
    assert found[1] == found[2]
    assert released(tmp_path / "run-1") == released(tmp_path / "run-2")
    for name in ("adapter_model.safetensors" if lora else "model.safetensors", "config.json", "adapter_config.json"):
        saved = [tmp_path / f"run-{size}" / name for size in (1, 2)]
        assert saved[0].exists() == saved[1].exists()
        assert not saved[0].exists() or saved[0].read_bytes() == saved[1].read_bytes(), name
    assert all(finding.holds for finding in verify(tmp_path / "run-2", base=str(base)))


def texts(count: int = ROWS) -> Dataset:
    return Dataset.from_list([{**row, "labels": row["input_ids"]} for row in labelled_rows(count)])


def test_an_adapter_and_a_head_train_on_a_split_body(run, tmp_path):
    def work(rank: int, size: int) -> str:
        frozen(rank, size)
        make = adapter_on_split_body if size > 1 else lambda: whole_model(lora=True)
        trainer = run(make, folder=f"run-{size}", eval_dataset=labelled_rows(7), eval_strategy="epoch")
        assert {isinstance(p, DTensor) for p in trainer.model.parameters()} == ({True, False} if size > 1 else {False})
        return fingerprint(trainer)

    found = {size: set(in_each(size, lambda rank, size=size: work(rank, size))) for size in (1, 3)}
    assert found[1] == found[3]
    assert released(tmp_path / "run-1") == released(tmp_path / "run-3")


def test_replicas_of_a_split_model_train_as_one_and_are_compared(run, tmp_path):
    """Two parts, of which two processes each hold the same."""

    def work(rank: int, drift: bool) -> str:
        frozen(rank, 4)

        def make() -> torch.nn.Module:
            return split(whole_model(False), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part")))

        class Drift(TrainerCallback):
            def on_train_begin(self, args, state, control, **rest):
                if drift and rank == 3:
                    with torch.no_grad():
                        next(rest["model"].parameters()).to_local().mul_(2)

        return fingerprint(run(make, folder=f"run-{drift}", save_strategy="no", callbacks=[Drift()]))

    def alone(rank: int) -> str:
        frozen(rank, 1)
        return fingerprint(run(lambda: whole_model(False), folder="alone", save_strategy="no"))

    assert set(in_each(4, lambda rank: work(rank, False))) == set(in_each(1, alone))
    errors = [one.error for one in ended(4, lambda rank: work(rank, True))]
    assert all("step=0: the 4 processes no longer hold the same weights" in error for error in errors)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"parallel": "points"},
            "parallel=points: .* is split over processes, and all processes have to be at",
        ),
        (
            {"points_per_pass": 2},
            "points_per_pass=2: .* is split over processes, and it needs whole parameters",
        ),
        ({"update": "adam"}, "is trained and split over processes, and moments, constraints and masks need all"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2},
            "load_best_model_at_end=True: .* is split over processes, and a checkpoint is not taken apart",
        ),
    ],
    ids=["points", "together", "adam", "best"],
)
def test_what_a_split_model_does_not_go_with_is_refused_in_each_process(settings, said, run):
    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=said):
            run(lambda: split(whole_model(False)), eval_data_is_public=True, eval_dataset=labelled_rows(6), **settings)

    in_each(2, work)


def test_parts_made_otherwise_are_refused(run):
    def distributed() -> torch.nn.Module:
        model = whole_model(False)
        mesh = init_device_mesh("cpu", (2,))
        model.score.weight = torch.nn.Parameter(distribute_tensor(model.score.weight.data, mesh, [Shard(0)]))
        return model

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"^model: score\.weight is split, and not by fully_shard, which alone"):
            run(distributed)

    in_each(2, work)


def test_a_run_without_privacy_splits_its_model_too(run):
    def work(rank: int) -> str:
        trainer = run(
            lambda: split(whole_model(False)),
            save_strategy="no",
            method="mezo",
            noise_multiplier=None,
            target_delta=None,
        )
        return fingerprint(trainer)

    assert len(set(in_each(2, work))) == 1


def test_what_is_trained_in_parts_is_not_pushed_by_one_process(run, monkeypatch):
    monkeypatch.setattr(ZOTrainer, "init_hf_repo", lambda trainer, token=None, private=None: None)

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"^push_to_hub=True: .* is trained and split over processes, and one of"):
            run(lambda: split(whole_model(False)), folder="refused", push_to_hub=True, save_strategy="no")
        trainer = run(lambda: split(whole_model(False)), save_strategy="no")
        with pytest.raises(ValueError, match=r"^push_to_hub: what is trained is split over processes, and pushing is"):
            trainer.push_to_hub()

    in_each(2, work)


def test_an_adapter_on_a_split_model_is_saved_by_one_process_alone(run, tmp_path):
    """So that it can be pushed."""

    def work(rank: int) -> None:
        trainer = run(
            lambda: with_lora(split(causal_lm()), TaskType.CAUSAL_LM), rows=texts(), save_strategy="no", max_steps=2
        )
        if rank == 0:
            trainer.save_model(str(tmp_path / "alone"))

    in_each(2, work)
    assert (tmp_path / "alone" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["tp_size", "pp_size"])
def test_other_parallelism_of_transformers_is_refused(kind, make_args, tmp_path):
    """Some of it stock refuses too, but not on all devices."""
    base = tmp_path / "base"
    causal_lm(tie_word_embeddings=False).save_pretrained(base)

    def work(rank: int) -> None:
        args, config = make_args(), DistributedConfig(**{kind: 2})
        model = AutoModelForCausalLM.from_pretrained(base, distributed_config=config)
        with pytest.raises(
            ValueError, match=rf"^{kind}=2: its processes have no rows of their own; set fsdp_size instead"
        ):
            refuse_sharded(model, args, distributed_type="MULTI_GPU")

    in_each(2, work)


def failing_once(inside: type, name: str, error: Exception, when) -> None:
    """Have a method of a class fail the first time that `when` holds of its module. In a child's own memory."""
    inner, failed = getattr(inside, name), []

    def fails(self, *given, **named):
        if not failed and when(self):
            failed.append(True)
            raise error
        return inner(self, *given, **named)

    setattr(inside, name, fails)


def training() -> list[bool]:
    """Whether private rows are evaluated by now: what is appended to, in a child's own memory."""
    begun: list[bool] = []
    inner = FSDPLosses.__call__

    def call(self, *given):
        begun.append(True)
        return inner(self, *given)

    FSDPLosses.__call__ = call
    return begun


@pytest.mark.parametrize("where", ["before", "gather"])
def test_a_process_that_fails_before_it_gathers_joins_in(where, run, tmp_path):
    """By a hook in front of FSDP's, or because there is no memory for the weights."""

    def work(rank: int) -> str:
        frozen(rank, 2)
        begun, lost = training(), torch.OutOfMemoryError("no memory")
        if where == "gather" and rank == 1:
            failing_once(FSDPParamGroup, "unshard", lost, lambda group: begun and "layers.0" in group._module_fqn)

        def made() -> torch.nn.Module:
            model = split(whole_model(False))
            if where == "before" and rank == 1:
                failed = []

                def fail(module: torch.nn.Module, args: tuple) -> None:
                    if begun and not failed:
                        failed.append(True)
                        raise RuntimeError("once")

                model.model.layers[0].register_forward_pre_hook(fail, prepend=True)
            return model

        return fingerprint(run(made, save_strategy="no"))

    found = set(in_each(2, work))
    whole = in_each(1, lambda rank: (frozen(rank, 1), fingerprint(run(lambda: whole_model(False), folder="whole")))[1])
    assert found == set(whole), "rows that can be evaluated alone are counted"


def test_a_process_that_can_not_join_in_ends(run):
    def work(rank: int) -> None:
        frozen(rank, 2)
        begun, lost = training(), torch.OutOfMemoryError("no memory")
        if rank == 1:
            inner = FSDPParamGroup.unshard

            def fails(group, *given, **named):
                if begun and "layers.0" in group._module_fqn:
                    raise lost
                return inner(group, *given, **named)

            FSDPParamGroup.unshard = fails
        run(lambda: split(whole_model(False)), save_strategy="no")

    errors = [one.error for one in ended(2, work)]
    assert "OutOfStepError: model: this process can not gather the weights that the others gather (OutOf" in errors[1]
    assert errors[0] is not None


def test_weights_that_two_modules_share_are_gathered_once(run, tmp_path):
    """Transformers puts them, and the last norm, into one group. One process has no rows."""
    base = tmp_path / "base"
    causal_lm(tie_word_embeddings=True).save_pretrained(base)

    def work(rank: int, size: int) -> str:
        BernoulliMask.draw = lambda mask: np.arange(mask.size) < 6 * (rank == size - 1)
        DiscreteGaussian.add = lambda self, values: values
        settings = {} if size == 1 else {"distributed_config": DistributedConfig(fsdp_size=size)}
        make = lambda: AutoModelForCausalLM.from_pretrained(base, **settings)  # noqa: E731
        return run(make, folder=f"run-{size}", rows=texts(), save_strategy="no").state.global_step

    assert in_each(2, lambda rank: work(rank, 2)) == [4, 4]


def test_tied_weights_are_saved_once(run, tmp_path):
    def work(rank: int, size: int) -> str:
        frozen(rank, size)
        torch.manual_seed(0)
        model = causal_lm(tie_word_embeddings=True)
        trainer = run((lambda: split(model)) if size > 1 else (lambda: model), folder=f"run-{size}", rows=texts())
        trainer.save_model()
        return fingerprint(trainer)

    assert set(in_each(2, lambda rank: work(rank, 2))) == set(in_each(1, lambda rank: work(rank, 1)))
    assert len({(tmp_path / f"run-{size}" / "model.safetensors").read_bytes() for size in (1, 2)}) == 1


def test_what_a_pass_runs_may_not_depend_on_rows(run, tmp_path):
    """Else weights of one module would be taken for those of another. Such a row fails, and counts for nothing."""

    def backwards() -> torch.nn.Module:
        model, last = split(whole_model(False)), []
        model.model.embed_tokens.register_forward_pre_hook(lambda module, args: last.append(bool(args[0][0][-1] % 2)))

        class Turned(torch.nn.ModuleList):
            def __getitem__(self, index):
                found = list(self._modules.values())[index]
                return found[::-1] if isinstance(index, slice) and begun and last[-1] else found

        model.model.layers.__class__ = Turned
        return model

    begun: list[bool] = []

    def work(rank: int) -> str:
        nonlocal begun
        frozen(rank, 2)
        begun = training()
        return fingerprint(run(backwards, save_strategy="no", per_device_train_batch_size=1))

    whole = in_each(1, lambda rank: (frozen(rank, 1), fingerprint(run(lambda: whole_model(False), folder="whole")))[1])
    assert set(in_each(2, work)).isdisjoint(whole), "no row failed"


def test_a_part_of_the_model_that_rows_never_reach_does_no_harm(run):
    def towers() -> torch.nn.Module:
        model = whole_model(False)
        model.unused = torch.nn.Linear(4, 4).requires_grad_(False)
        fully_shard(model.unused, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model.model, mesh=init_device_mesh("cpu", (2,)))
        model.score.requires_grad_(False)
        return model

    assert len(set(in_each(2, lambda rank: fingerprint(run(towers, save_strategy="no"))))) == 1


def test_weights_that_are_gathered_in_16_bits_are_refused(run):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"^mp_policy: weights would be gathered in torch\.bfloat16, which rounds"):
            run(lambda: fully_shard(whole_model(False), mp_policy=policy))

    in_each(2, work)


def test_what_is_trained_is_in_parts_or_whole(run):
    def body() -> torch.nn.Module:
        model = whole_model(False)
        split(model.model)
        return model

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"^model: .* is trained in parts and score\.weight is not, which stock"):
            run(body)

    in_each(2, work)
