"""Scales of kinds of parameters: matched by name, kept in the log, replayed, resumed and verified."""

import json

import pytest
from peft import LoraConfig, TaskType

from hf_dpzo import Trajectory, ZOTrainer, seeded_peft_model
from hf_dpzo.cli.main import main
from hf_dpzo.trajectory.header import TrajectoryError, parse_header
from hf_dpzo.zo.optimizer import ZOOptimizer

from support.models import one_layer
from support.recipes import refused
from support.rows import few_public_rows, labelled_rows


def read_scales(folder) -> dict[str, float]:
    return {name.split(".")[-3]: scale for name, scale in Trajectory.read(folder).header.get("scales", {}).items()}


def test_a_recipe_with_scales_verifies_and_goes_on(write, workplace, capsys):
    scales = {"lora_freeze_a": False, "perturbation_scales": {"lora_A": 0.25}}
    assert main(["train", write(**scales)]) == 0
    out = workplace / "out"
    assert read_scales(out) == {"lora_A": 0.25}
    assert "| perturbation_scales | 0.25 for 4 of 8 parameters |" in (out / "README.md").read_text()
    assert main(["verify", str(out), "--base", str(workplace / "causal")]) == 0
    assert main(["train", write(**scales), "--resume_from_checkpoint", "true"]) == 0
    other = refused(
        capsys, "train", write(**{**scales, "perturbation_scales": "absent"}), "--resume_from_checkpoint", "true"
    )
    assert "scales" in other and "set what it had" in other


def test_a_verification_sees_scales_that_were_changed(write, workplace, monkeypatch):
    assert main(["train", write(lora_freeze_a=False, perturbation_scales={"lora_B": 0.25})]) == 0
    monkeypatch.setattr(ZOOptimizer, "scale_directions", lambda *_: None)
    assert main(["verify", str(workplace / "out"), "--base", str(workplace / "causal")]) != 0


@pytest.mark.parametrize("points_per_pass", [None, 2])
def test_a_head_beside_an_adapter_moves_by_its_scale(make_args, points_per_pass):
    """What the noise alone moves shows it: every coordinate of a sign's direction moves by as much."""
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"])
    moved = {}
    for scale in (1, 2**-6):
        model = seeded_peft_model(one_layer(), config, seed=0, freeze_a=True)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        scales = {"perturbation_scales": {"score": scale}}
        args = make_args(max_steps=1, weight_decay=0.0, points_per_pass=points_per_pass, **scales)
        ZOTrainer(model=model, args=args, train_dataset=labelled_rows(16), probe_rows=few_public_rows()).train()
        steps = {
            name: (p.detach() - before[name]).abs().max() for name, p in model.named_parameters() if name in before
        }
        head, adapter = ([v for k, v in steps.items() if ("score" in k) == is_head] for is_head in (True, False))
        moved[scale] = float(max(head) / max(adapter))
        assert read_scales(args.output_dir) == ({} if scale == 1 else {"modules_to_save": scale})
    assert moved[1] == pytest.approx(1, rel=1e-3) and moved[2**-6] == pytest.approx(2**-6, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"perturbation_scales": {"lora_C": 2}}, "no trained parameter is left whose name holds 'lora_C'"),
        ({"perturbation_scales": {"lora": 2, "lora_B": 3}}, "is left whose name holds 'lora_B'; correct it, or name"),
        ({"perturbation_scales": {"lora": 0}}, "perturbation_scales[lora]=0: it must be positive"),
        ({"perturbation_scales": "none"}, "perturbation_scales='none': it is no mapping"),
        ({"perturbation_scales": {"lora": 2}, "update": "adam"}, "update=adam divides scales out of its steps"),
    ],
    ids=str,
)
def test_scales_of_nothing_are_refused(write, capsys, changes, said):
    assert said in refused(capsys, "train", write(**changes))


def test_a_log_without_scales_says_nothing_of_them_and_one_of_strangers_parameters_is_refused(write, workplace):
    assert main(["train", write()]) == 0
    header = dict(Trajectory.read(workplace / "out").header)
    assert "scales" not in header
    with pytest.raises(TrajectoryError, match="scales: they are of parameters that are in no group"):
        parse_header(json.dumps({**header, "scales": {"elsewhere": 2.0}}).encode())
