"""Runs of adapters of any name, alone or beside others: what is trained is saved, pushed, resumed and verified."""

import contextlib
import copy
import json

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer, replay_onto, seeded_peft_model
from hf_dpzo.verification.verify import verify

from support.local_hub import hub  # noqa: F401 - a fixture
from support.models import one_layer, word_tokenizer
from support.rows import few_public_rows, labelled_rows


CASES = {"named": ("medical", ()), "two": ("default", ("secret",)), "two named": ("medical", ("default", "secret"))}
STEPS = 4


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"task_type": TaskType.SEQ_CLS, "r": 2, "target_modules": ["q_proj", "v_proj"], **changes})


class At(TrainerCallback):
    """Does something once, at a step."""

    def __init__(self, step: int, work) -> None:
        self.step, self.work = step, work

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.work(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    one_layer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(make_args, base, tmp_path):
    def made(case: str = "named", callbacks=(), model=None, **changes) -> ZOTrainer:
        name, others = CASES[case]
        torch.manual_seed(1)
        if model is None:
            model = get_peft_model(type(one_layer()).from_pretrained(base), lora(), adapter_name=name)
            for other in others:
                model.add_adapter(other, lora(target_modules=["k_proj"]))
            model.set_adapter(name)
        return ZOTrainer(
            model=model,
            args=make_args(**{"output_dir": str(tmp_path / "out"), "max_steps": STEPS, **changes}),
            train_dataset=labelled_rows(20),
            eval_dataset=labelled_rows(8, seed=3),
            data_collator=DataCollatorWithPadding(word_tokenizer()),
            probe_rows=few_public_rows(),
            callbacks=list(callbacks),
        )

    return made


def failing(folder, base) -> list[str]:
    return [finding.detail for finding in verify(folder, base=str(base)) if finding.holds is False]


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_verifies_loads_and_holds_no_other_adapter(case, make, base, tmp_path):
    trainer = make(case)
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    assert failing(out, base) == []
    assert not [path for path in out.rglob("*") if path.is_dir()]
    assert not any("secret" in name for name in load_file(out / "adapter_model.safetensors"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(out).eval()
    loaded.config.pad_token_id = 0
    tokens = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(loaded(**tokens).logits, trainer.model.eval()(**tokens).logits)
    log = Trajectory.read(out)
    assert all("default" in name for group in log.header["groups"] for name in group["parameters"])


@pytest.mark.parametrize("case", CASES)
def test_a_log_leads_to_the_weights_whatever_the_adapter_is_called(case, make, tmp_path):
    fresh = copy.deepcopy(make(case).model)
    trainer = make(case)
    trainer.train()
    replay_onto(fresh, Trajectory.read(tmp_path / "out"))
    assert all(torch.equal(p, dict(trainer.model.named_parameters())[n]) for n, p in fresh.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_from_its_checkpoint(case, make, base, tmp_path):
    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(case, [At(3, stop)], save_strategy="steps", save_steps=1).train()
    trainer = make(case, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert len(Trajectory.read(tmp_path / "out").records) == STEPS
    assert failing(tmp_path / "out", base) == []
    assert failing(tmp_path / "out" / "checkpoint-2", base) == []


def test_the_best_weights_are_loaded_into_the_adapter_that_is_trained(make, base, tmp_path):
    trainer = make(
        "two named",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        eval_data_is_public=True,
    )
    trainer.train()
    trainer.save_model()
    said = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert said["reproducibility"]["weights"]["after_step"] == trainer.state.best_global_step
    assert failing(tmp_path / "out", base) == []


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_pushed_whatever_its_adapter_is_called_and_no_other_one_with_it(case, make, hub, base):  # noqa: F811
    trainer = make(case, push_to_hub=True, hub_model_id="tester/x")
    trainer.train()
    trainer.push_to_hub()
    files = HfApi().list_repo_files("tester/x")
    assert "adapter_model.safetensors" in files and not [name for name in files if "/" in name]
    assert failing("tester/x", base) == []


SWITCHES = {
    "switched": lambda model: model.set_adapter("secret"),
    "merged": lambda model: model.merge_adapter(),
    "merged for good": lambda model: model.merge_and_unload(),
    "deleted": lambda model: (model.set_adapter("secret"), model.delete_adapter("default")),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "added": lambda model: model.add_adapter("third", lora()),
    "deleted another one": lambda model: model.delete_adapter("secret"),
    "frozen": lambda model: [p.requires_grad_(False) for p in model.parameters()],
    "unfrozen": lambda model: [p.requires_grad_(True) for p in model.parameters()],
    "scaled": lambda model: next(m for m in model.modules() if isinstance(m, LoraLayer)).scale_layer(50),
}


@pytest.mark.filterwarnings("ignore:Adapter")
@pytest.mark.parametrize("how", SWITCHES)
def test_a_callback_that_reaches_into_the_adapters_ends_the_run_before_the_next_rows(how, make, tmp_path):
    trainer = make("two", [At(2, SWITCHES[how])])
    with pytest.raises(ValueError, match=r"adapter=|model: it no longer holds|parameter="):
        trainer.train()
    assert len(Trajectory.read(tmp_path / "out").records) == 2


@pytest.mark.parametrize("how", ["switched", "merged", "disabled"])
def test_an_adapter_that_is_switched_after_training_is_neither_saved_nor_pushed_nor_evaluated(how, make, tmp_path, hub):  # noqa: F811
    trainer = make("two", push_to_hub=True, hub_model_id="tester/x")
    trainer.train()
    SWITCHES[how](trainer.model)
    for work in (trainer.save_model, trainer.evaluate, trainer.create_model_card, trainer.push_to_hub):
        with pytest.raises(ValueError, match=r"adapter=|model: "):
            work()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "adapter_model.safetensors" not in HfApi().list_repo_files("tester/x")
    assert "base_loss" in trainer.evaluate(metric_key_prefix="base")  # For comparison; no card shows it.


@pytest.mark.parametrize("how", ["merged", "disabled", "scaled"])
def test_a_run_of_a_merged_disabled_or_scaled_adapter_does_not_begin(how, make):
    trainer = make("two")
    SWITCHES[how](trainer.model)
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="adapter=default: "):
        trainer.train()


def test_a_saved_adapter_of_another_name_goes_on_where_it_ended(make, base, tmp_path):
    trainer = make("named")
    trainer.train()
    trainer.save_model()
    again = PeftModel.from_pretrained(
        type(one_layer()).from_pretrained(base), tmp_path / "out", adapter_name="other", is_trainable=True
    )
    assert torch.equal(
        again.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.other").weight,
        trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.medical").weight,
    )


CHANGES = {
    "none": (lambda model: None, 5),
    "other values": (
        lambda model: torch.nn.init.ones_(model.base_model.model.score.modules_to_save.default.weight),
        None,
    ),
    "another adapter": (lambda model: (model.add_adapter("second", lora()), model.set_adapter("second")), None),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_seed_counts_only_while_the_adapter_has_the_values_that_it_gave(how, make, base, tmp_path):
    """A log that named the seed of values that were overwritten would lead elsewhere."""

    def stop(model):
        raise KeyboardInterrupt

    change, seed = CHANGES[how]
    for resume, callbacks in ((False, [At(3, stop)]), (True, ())):
        torch.manual_seed(1)
        model = seeded_peft_model(type(one_layer()).from_pretrained(base), lora(), seed=5)
        change(model)
        trainer = make(model=model, callbacks=callbacks, save_strategy="steps", save_steps=2)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    assert Trajectory.read(tmp_path / "out").header["adapter"]["seed"] == seed
    assert failing(tmp_path / "out", base) == []


def test_a_run_that_was_stopped_goes_on_in_the_same_trainer_from_its_seed(make, base, tmp_path):
    def stop(model):
        raise KeyboardInterrupt

    model = seeded_peft_model(type(one_layer()).from_pretrained(base), lora(), seed=5)
    stopping = At(3, stop)
    trainer = make(model=model, callbacks=[stopping], save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stopping.step = None
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert Trajectory.read(tmp_path / "out").header["adapter"]["seed"] == 5
    assert failing(tmp_path / "out", base) == []
