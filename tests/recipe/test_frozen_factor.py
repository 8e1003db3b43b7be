"""LoRA whose first matrix stays as it was drawn: trained, published, resumed, and verified."""

import pytest
import torch
from peft import IA3Config, LoraConfig, TaskType, get_peft_model

from hf_dpzo import Trajectory, ZOTrainer, seeded_peft_model
from hf_dpzo.cli.main import main
from hf_dpzo.models.seeded import forget_changed_seed, get_adapter_seed
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import run_recipe
from hf_dpzo.trajectory import initial
from hf_dpzo.trajectory.going_on import list_trained_names
from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.verification.verify import verify

from support.models import one_layer
from support.recipes import refused
from support.rows import labelled_rows


def lora(module: str = "q_proj") -> LoraConfig:
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=[module])


def trained(folder) -> set[str]:
    """The factors that the log in a folder says were trained."""
    names = list_trained_names(Trajectory.read(folder).header)
    return {segment for name in names for segment in name.split(".") if segment.startswith("lora_")}


def holds(folder, base) -> bool:
    return main(["verify", str(folder), "--base", str(base)]) == 0


def test_a_recipe_trains_the_second_factor_alone_and_its_folder_verifies(write, workplace):
    assert main(["train", write()]) == 0
    out = workplace / "out"
    assert trained(out) == {"lora_B"}
    assert Trajectory.read(out).header["adapter"]["seed"] == 42 and not (out / INITIAL_FILE).exists()
    assert holds(out, workplace / "causal")
    assert main(["train", write(), "--resume_from_checkpoint", "true"]) == 0
    assert "set lora_freeze_a: true in a recipe" in _refused_to_resume(write, lora_freeze_a=False)


def _refused_to_resume(write, **changes) -> str:
    with pytest.raises(ValueError, match=r"lora_A.default.weight and 3 more, other than this one") as error:
        run_recipe(*read_recipe(write(**changes, resume_from_checkpoint="true")))
    return str(error.value)


def test_a_run_of_both_factors_goes_on_with_both_unless_the_recipe_says_otherwise(write, workplace):
    assert main(["train", write(lora_freeze_a=False)]) == 0
    out = workplace / "out"
    assert trained(out) == {"lora_A", "lora_B"} and holds(out, workplace / "causal")
    assert main(["train", write(), "--resume_from_checkpoint", "true"]) == 0
    assert "set lora_freeze_a: false in a recipe" in _refused_to_resume(write, lora_freeze_a=True)


def test_a_run_of_an_earlier_version_which_kept_no_seed_goes_on_and_verifies(write, workplace, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(initial, "get_adapter_seed", lambda model: None)
        earlier.setattr(initial, "list_saved", lambda model, name: set())
        assert main(["train", write()]) == 0
    out = workplace / "out"
    assert Trajectory.read(out).header["adapter"]["seed"] is None
    assert holds(out, workplace / "causal")
    assert main(["train", write(), "--resume_from_checkpoint", "true"]) == 0


def test_a_head_on_features_has_no_factor_to_freeze(write, capsys):
    head = {"task": "feature-classification", "lora_target_modules": "absent", "lora_r": "absent"}
    assert "lora_freeze_a=True: a head on features has no adapter" in refused(
        capsys, "train", write(**head, lora_freeze_a=True)
    )


def test_frozen_parts_of_an_adapter_without_a_seed_are_kept_beside_the_log(make_args, tmp_path):
    torch.manual_seed(0)
    one_layer().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(one_layer()).from_pretrained(tmp_path / "base"), lora())  # From any randomness.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    args = make_args(max_steps=1)
    trainer = ZOTrainer(model=model, args=args, train_dataset=labelled_rows(16))
    trainer.train()
    trainer.save_model()
    findings = verify(args.output_dir, base=str(tmp_path / "base"))
    assert findings and not [finding for finding in findings if finding.holds is False]
    assert trained(args.output_dir) == {"lora_B"}


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_seed_is_kept_where_a_factor_is_frozen_and_forgotten_where_a_value_or_more_changes(by_hand):
    model = seeded_peft_model(one_layer(), lora(), seed=5, freeze_a=not by_hand)
    factors = {name: parameter for name, parameter in model.named_parameters() if "lora_A" in name}
    assert factors and all(parameter.requires_grad == by_hand for parameter in factors.values())
    for parameter in factors.values():
        parameter.requires_grad_(False)
    forget_changed_seed(model)
    assert get_adapter_seed(model) == 5
    with torch.no_grad():
        next(iter(factors.values())).view(-1)[0] += 1  # It is frozen, and drawn from the seed all the same.
    forget_changed_seed(model)
    assert get_adapter_seed(model) is None


def test_a_seed_is_forgotten_where_more_is_trained_than_it_gave():
    model = seeded_peft_model(one_layer(), lora(), seed=5)
    model.get_input_embeddings().weight.requires_grad_(True)
    forget_changed_seed(model)
    assert get_adapter_seed(model) is None


def test_the_drawn_factor_is_frozen_also_where_peft_swaps_the_two():
    model = seeded_peft_model(one_layer(), lora("embed_tokens"), seed=5, freeze_a=True)
    values = {name: p for name, p in model.named_parameters() if "lora_embedding" in name}
    assert {name: p.requires_grad for name, p in values.items()} == {name: not p.any() for name, p in values.items()}


def test_an_adapter_without_factors_has_none_to_freeze():
    config = IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="freeze_a=True: IA3 has no factor A; leave it out, or choose LoRA"):
        seeded_peft_model(one_layer(), config, seed=0, freeze_a=True)
