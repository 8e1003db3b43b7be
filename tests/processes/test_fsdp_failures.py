"""Rows and processes that fail where each holds a part of the model: nobody waits, and the others count."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian
from hf_dpzo.step.fsdp import FSDPLosses

from support.models import causal_lm
from support.parts import run, run_of, split, texts, whole_model
from support.processes import ROWS, Here, alone, frozen
from support.rows import labelled_rows
from support.runs import fingerprint, released
from support.sweeps import slow


def trained(here: Here, folder: Path) -> str:
    frozen(here)
    return fingerprint(run_of(here, whole_model, folder))


# ---- Rows ----


def failing_on_some_rows(where: str) -> torch.nn.Module:
    """A model that can not read every fifth row, which it notices in the module of that name."""
    model = whole_model()
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


def trained_on_what_it_can_read(here: Here, where: str, folder: Path) -> str:
    frozen(here)
    return fingerprint(run_of(here, lambda: failing_on_some_rows(where), folder))


@pytest.mark.parametrize("where", ["embed_tokens", "norm", "layers.1"])
def test_a_row_that_fails_in_one_process_counts_for_nothing_and_blocks_no_process(where, pair, tmp_path):
    one = alone(trained_on_what_it_can_read, where, tmp_path / "one")
    assert pair.each(trained_on_what_it_can_read, where, tmp_path / "several") == [one] * 2
    assert alone(trained, tmp_path / "all") != one, "no row failed"


def trained_while_one_has_rows(here: Here, folder: Path) -> str:
    here.patch.setattr(BernoulliSampler, "draw", lambda mask: np.arange(mask.size) < 3 * (here.rank == 1))
    return fingerprint(run_of(here, whole_model, folder))


@pytest.mark.parametrize("size", [2, *slow(3)])
def test_processes_without_rows_join_in(size, launched, tmp_path):
    assert len(set(launched[size].each(trained_while_one_has_rows, tmp_path))) == 1
    assert len(released(tmp_path)) == 4


def steps_of_shared_weights(here: Here, base: Path, folder: Path) -> int:
    """Of a model that transformers splits. One process has no rows."""
    here.patch.setattr(BernoulliSampler, "draw", lambda mask: np.arange(mask.size) < 6 * (here.rank == here.size - 1))
    here.patch.setattr(DiscreteGaussian, "add", lambda noise, values: values)
    settings = {"distributed_config": DistributedConfig(fsdp_size=here.size)}
    make = lambda: AutoModelForCausalLM.from_pretrained(base, **settings)  # noqa: E731
    return run(make, folder, rows=texts()).state.global_step


def test_weights_that_two_modules_share_are_gathered_once(pair, tmp_path):
    """Transformers puts them, and the last norm, into one group."""
    causal_lm(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    assert pair.each(steps_of_shared_weights, tmp_path / "base", tmp_path / "run") == [4, 4]


def trained_backwards_on_some_rows(here: Here, folder: Path) -> str:
    """The order of the layers depends on the row's last token."""
    frozen(here)
    begun = training(here)

    def backwards() -> torch.nn.Module:
        model, last = split(whole_model()), []
        model.model.embed_tokens.register_forward_pre_hook(lambda module, args: last.append(bool(args[0][0][-1] % 2)))

        class Turned(torch.nn.ModuleList):
            def __getitem__(self, index):
                found = list(self._modules.values())[index]
                return found[::-1] if isinstance(index, slice) and begun and last[-1] else found

        model.model.layers.__class__ = Turned
        return model

    return fingerprint(run(backwards, folder, per_device_train_batch_size=1))


def test_what_a_pass_runs_may_not_depend_on_rows(pair, tmp_path):
    """Else weights of one module would be taken for those of another. Such a row fails, and counts for nothing."""
    ends = pair.each(trained_backwards_on_some_rows, tmp_path / "several")
    assert alone(trained, tmp_path / "one") not in ends, "no row failed"


def trained_with_a_part_that_rows_never_reach(here: Here, folder: Path) -> str:
    def towers() -> torch.nn.Module:
        model, mesh = whole_model(), init_device_mesh("cpu", (2,))
        model.unused = torch.nn.Linear(4, 4).requires_grad_(False)
        fully_shard(model.unused, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
        model.score.requires_grad_(False)
        return model

    return fingerprint(run(towers, folder))


def test_a_part_of_the_model_that_rows_never_reach_does_no_harm(pair, tmp_path):
    assert len(set(pair.each(trained_with_a_part_that_rows_never_reach, tmp_path))) == 1


# ---- Processes ----


def training(here: Here) -> list[bool]:
    """What is not empty from when private rows are evaluated."""
    begun: list[bool] = []
    inner = FSDPLosses.__call__
    here.patch.setattr(FSDPLosses, "__call__", lambda losses, *given: begun.append(True) or inner(losses, *given))
    return begun


def failing_to_gather(here: Here, begun: list[bool], *, times: float) -> None:
    """Have the gathering of the first layer's weights fail so often in this process, from when training has begun."""
    inner, failed = FSDPParamGroup.unshard, []

    def unshard(group, *given, **named):
        if begun and len(failed) < times and "layers.0" in group._module_fqn:
            failed.append(True)
            raise torch.OutOfMemoryError("no memory")
        return inner(group, *given, **named)

    here.patch.setattr(FSDPParamGroup, "unshard", unshard)


def failing_before(model: torch.nn.Module, begun: list[bool]) -> torch.nn.Module:
    """Have the first layer fail once, in front of FSDP's own hook, from when training has begun."""
    failed = []

    def fail(module: torch.nn.Module, args: tuple) -> None:
        if begun and not failed:
            failed.append(True)
            raise RuntimeError("once")

    model.model.layers[0].register_forward_pre_hook(fail, prepend=True)
    return model


def trained_though_one_fails_once(here: Here, where: str, folder: Path) -> str:
    frozen(here)
    begun = training(here)
    if where == "gather" and here.rank == 1:
        failing_to_gather(here, begun, times=1)

    def made() -> torch.nn.Module:
        model = split(whole_model())
        return failing_before(model, begun) if where == "before" and here.rank == 1 else model

    return fingerprint(run(made, folder))


@pytest.mark.parametrize("where", ["before", "gather"])
def test_a_process_that_fails_before_it_gathers_joins_in(where, pair, tmp_path):
    """By a hook in front of FSDP's, or because there is no memory for the weights."""
    found = pair.each(trained_though_one_fails_once, where, tmp_path / "several")
    assert found == [alone(trained, tmp_path / "one")] * 2, "rows that can be evaluated alone are counted"


def trained_though_one_never_gathers(here: Here, folder: Path) -> None:
    frozen(here)
    begun = training(here)
    if here.rank == 1:
        failing_to_gather(here, begun, times=float("inf"))
    run(lambda: split(whole_model()), folder)


def test_a_process_that_cannot_take_part_ends(pair, tmp_path):
    errors = [one.error for one in pair.ended(trained_though_one_never_gathers, tmp_path)]
    assert "OutOfSyncError: model: this process can not gather the weights that the others gather (OutOf" in errors[1]
    assert errors[0] is not None
