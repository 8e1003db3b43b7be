"""Runs of models of which each process holds a part: the same integers and bits as of the whole model."""

from pathlib import Path

import pytest
import torch
from peft import TaskType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_dpzo import Trajectory
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.trajectory.replay import replay_onto
from hf_dpzo.verification.verify import verify

from support.models import causal_lm, classifier, with_lora
from support.parts import run, run_of, split, texts, whole_model
from support.processes import Here, alone, frozen
from support.rows import labelled_rows
from support.runs import fingerprint, released
from support.stops import Death
from support.sweeps import slow, sweep


NO_CARD = {"save_strategy": "no"}


def trained_and_saved(here: Here, lora: bool, settings: dict, folder: Path) -> str:
    frozen(here)
    trainer = run_of(here, lambda: whole_model(lora=lora), folder, **NO_CARD, **settings)
    assert all(isinstance(p, DTensor) == (here.size > 1) for p in trainer.model.parameters())
    trainer.save_model()
    return fingerprint(trainer)


@pytest.mark.parametrize("size", [2, *slow(3)])
@sweep(lora=[False, True], settings=[{}, {"num_directions": 2, "method": "aggzo"}])
def test_a_split_model_releases_the_same_integers_and_ends_at_the_same_bits(lora, settings, size, launched, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    end = alone(trained_and_saved, lora, settings, one)
    assert launched[size].each(trained_and_saved, lora, settings, several) == [end] * size
    assert len(released(one)) == 4
    assert released(one) == released(several)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (one / name).read_bytes() == (several / name).read_bytes()


EVALUATED_AND_SAVED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def begun(here: Here, folder: Path) -> None:
    frozen(here)
    death = Death(here.rank == 1, after=2)
    run_of(here, whole_model, folder, eval_dataset=labelled_rows(7), callbacks=(death,), **EVALUATED_AND_SAVED)


def resumed(here: Here, folder: Path) -> tuple[str, int]:
    frozen(here, seed=1)
    trainer = run_of(here, whole_model, folder, resume=True, eval_dataset=labelled_rows(7), **EVALUATED_AND_SAVED)
    return fingerprint(trainer), len([one for one in trainer.state.log_history if "eval_loss" in one])


@pytest.mark.parametrize("size", [1, *slow(3)])
def test_an_evaluated_and_saved_run_goes_on_with_another_number_of_processes(size, launched, tmp_path):
    first = launched[2].ended(begun, tmp_path)
    assert any(one.killed or one.error for one in first)
    assert 2 <= len(released(tmp_path)) <= 3
    ends = launched[size].each(resumed, tmp_path) if size > 1 else [alone(resumed, tmp_path)]
    ((found, evaluations),) = set(ends)
    assert evaluations >= 2
    model = whole_model()
    replay_onto(model, Trajectory.read(tmp_path))
    assert fingerprint_values(model.parameters()) == found


# ---- Made in other ways ----


def trained_as_loaded(here: Here, lora: bool, base: Path, folder: Path) -> str:
    """Of a causal language model that transformers splits while it loads it."""
    frozen(here)
    distributed = {} if here.size == 1 else {"distributed_config": DistributedConfig(fsdp_size=here.size)}

    def made() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(base, **distributed)
        torch.manual_seed(1)
        return with_lora(model, TaskType.CAUSAL_LM) if lora else model

    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer = run(made, folder, rows=texts(), **saving)
    parts = [isinstance(p, DTensor) for p in trainer.model.parameters() if p.requires_grad == (not lora)]
    assert all(parts) if here.size > 1 else not any(parts)
    assert not lora or not any(isinstance(p, DTensor) for p in trainer.model.parameters() if p.requires_grad)
    trainer.save_model()
    return fingerprint(trainer)


@pytest.mark.parametrize("lora", [False, True], ids=["all", "adapter"])
def test_a_model_that_transformers_splits_while_loading_ends_at_the_same_bits(lora, pair, tmp_path):
    """An adapter that is added to it is whole in each process."""
    base, one, several = (tmp_path / name for name in ("base", "one", "several"))
    causal_lm().save_pretrained(base)
    end = alone(trained_as_loaded, lora, base, one)
    assert pair.each(trained_as_loaded, lora, base, several) == [end] * 2
    assert released(one) == released(several)
    for name in ("adapter_model.safetensors" if lora else "model.safetensors", "config.json", "adapter_config.json"):
        assert (one / name).exists() == (several / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (several / name).read_bytes(), name
    assert all(finding.holds for finding in verify(several, base=str(base)))


def adapter_on_split_body() -> torch.nn.Module:
    """The head is left whole, for PEFT copies it."""
    torch.manual_seed(0)
    model = classifier()
    split(model.model)
    return with_lora(model)


def trained_on_split_body(here: Here, folder: Path) -> str:
    frozen(here)
    make = adapter_on_split_body if here.size > 1 else lambda: whole_model(lora=True)
    trainer = run(make, folder, eval_dataset=labelled_rows(7), eval_strategy="epoch", **NO_CARD)
    kinds = {isinstance(p, DTensor) for p in trainer.model.parameters()}
    assert kinds == ({True, False} if here.size > 1 else {False})
    return fingerprint(trainer)


@pytest.mark.parametrize("size", [2, *slow(3)])
def test_an_adapter_and_a_head_train_on_a_split_body(size, launched, tmp_path):
    one = alone(trained_on_split_body, tmp_path / "one")
    assert launched[size].each(trained_on_split_body, tmp_path / "several") == [one] * size
    assert released(tmp_path / "one") == released(tmp_path / "several")


class Doubled(TrainerCallback):
    """Doubles the first parameter before training begins, where it is `armed`."""

    def __init__(self, armed: bool) -> None:
        self._armed = armed

    def on_train_begin(self, args, state, control, model=None, **rest) -> None:
        if self._armed:
            with torch.no_grad():
                next(model.parameters()).to_local().mul_(2)


def trained_in_replicas(here: Here, shape: tuple[int, int], drift: bool, folder: Path) -> str:
    """Each part of the model is held by `shape[0]` processes. The last of all may drift."""
    frozen(here)

    def replicas() -> torch.nn.Module:
        return split(whole_model(), init_device_mesh("cpu", shape, mesh_dim_names=("copy", "part")))

    make = replicas if here.size > 1 else whole_model
    return fingerprint(run(make, folder, callbacks=(Doubled(drift and here.rank == here.size - 1),), **NO_CARD))


def stopped_in_replicas(here: Here, shape: tuple[int, int], folder: Path) -> str:
    with pytest.raises(RuntimeError) as error:
        trained_in_replicas(here, shape, True, folder)
    return str(error.value)


@pytest.mark.parametrize("shape", [(2, 1), *slow((2, 2))], ids=str)
def test_replicas_of_a_split_model_train_as_one_and_are_compared(shape, launched, tmp_path):
    size = shape[0] * shape[1]
    one = alone(trained_in_replicas, shape, False, tmp_path / "one")
    assert launched[size].each(trained_in_replicas, shape, False, tmp_path / "several") == [one] * size
    said = launched[size].each(stopped_in_replicas, shape, tmp_path / "drift")
    assert all(f"step=0: the {size} processes no longer hold the same weights" in one for one in said)


def trained_without_privacy(here: Here, folder: Path) -> str:
    plain = {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"}
    return fingerprint(run_of(here, whole_model, folder, **NO_CARD, **plain))


def test_a_run_without_privacy_splits_its_model_too(pair, tmp_path):
    assert len(set(pair.each(trained_without_privacy, tmp_path))) == 1


def adapter_saved_by_one(here: Here, folder: Path) -> None:
    make = lambda: with_lora(split(causal_lm()), TaskType.CAUSAL_LM)  # noqa: E731
    trainer = run(make, folder / "run", rows=texts(), max_steps=2, **NO_CARD)
    if here.rank == 0:
        trainer.save_model(str(folder / "alone"))


def test_an_adapter_on_a_split_model_is_saved_by_one_process_alone(pair, tmp_path):
    """So that it can be pushed."""
    pair.each(adapter_saved_by_one, tmp_path)
    assert (tmp_path / "alone" / "adapter_model.safetensors").is_file()


def tied_and_saved(here: Here, folder: Path) -> str:
    frozen(here)
    trainer = run_of(here, lambda: causal_lm(tie_word_embeddings=True), folder, rows=texts(), **NO_CARD)
    trainer.save_model()
    return fingerprint(trainer)


def test_tied_weights_are_saved_once(pair, tmp_path):
    one = alone(tied_and_saved, tmp_path / "one")
    assert pair.each(tied_and_saved, tmp_path / "several") == [one] * 2
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "several")}) == 1
