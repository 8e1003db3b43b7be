"""Steps that share frozen work release the integers of steps that do not, and evaluate frozen layers once."""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import TrainerCallback

from hf_dpzo.trainer import checking

from support.activated import activated_model, activated_rows, right_collator
from support.models import causal_lm, classifier
from support.runs import train
from support.stacks import find_layers


def upper_lora() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[2])
    return get_peft_model(classifier(num_hidden_layers=3), config)


SETTINGS = {
    "one point": {"method": "aggzo", "num_directions": 3},
    "several points": {"method": "aggzo", "num_directions": 3, "points_per_pass": 2},
    "one direction": {"method": "dpzero"},
    "without public shapes": {"method": "aggzo", "num_directions": 2, "padded_lengths": None},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_shared_work_changes_no_integer(changes, tmp_path, sums, monkeypatch):
    train(tmp_path / "shared", model=upper_lora(), **changes)
    shared = sums.copy()
    sums.clear()
    monkeypatch.setattr(checking, "find_shared_work", lambda *_, **__: None)
    train(tmp_path / "whole", model=upper_lora(), **changes)
    assert shared == sums and any(map(any, sums))


@pytest.mark.parametrize("changes", [{}, {"padded_lengths": None}, {"points_per_pass": 4}], ids=str)
def test_steps_from_the_invocation_on_release_what_whole_rows_do(changes, tmp_path, sums, monkeypatch):
    settings = {"method": "aggzo", "num_directions": 2, "clip_norm": 10.0, "rows": activated_rows(24), **changes}

    def run(name: str) -> list[list[int]]:
        sums.clear()
        torch.manual_seed(0)
        model = activated_model(causal_lm(num_hidden_layers=2), layers_to_transform=[1])
        settings["collator"], settings["probe_rows"] = right_collator(), activated_rows(7, seed=1).to_list()
        train(tmp_path / name, model=model, **settings)
        return sums.copy()

    fast = run("fast")
    monkeypatch.setattr(checking, "find_shared_work", lambda *_, **__: None)
    whole = run("whole")
    for one, other in zip(fast, whole, strict=True):
        # The losses are rounded to float32, and the sum of some 24 rows is on a lattice of 2**-40 clip norms.
        assert all(abs(a - b) < 2**40 * 1e-4 for a, b in zip(one, other, strict=True))
        assert max(map(abs, other)) > 2**40 * 1e-2


class Counter(TrainerCallback):
    """Counts how often layers compute in a step."""

    def __init__(self, layers: dict[str, torch.nn.Module]) -> None:
        self.counts = dict.fromkeys(layers, 0)
        for name, layer in layers.items():
            layer.mlp.register_forward_hook(lambda *_, name=name: self._count(name))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.counts = dict.fromkeys(self.counts, 0)

    def _count(self, name: str) -> None:
        self.counts[name] += 1


def test_a_step_evaluates_frozen_layers_once(tmp_path, sums):
    model = upper_lora()
    frozen, _, trained = find_layers(model)
    counter = Counter({"frozen": frozen, "trained": trained})
    train(tmp_path, model=model, method="aggzo", num_directions=4, max_steps=1, callbacks=[counter])
    assert 0 < counter.counts["frozen"] * 8 == counter.counts["trained"]
