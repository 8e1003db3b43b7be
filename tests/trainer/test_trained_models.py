"""A private run does not begin from what another run of this process led to, however the model reaches the trainer."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import ZOTrainer, seeded_peft_model

from support.bases import LORA, load
from support.models import one_layer, word_tokenizer
from support.rows import few_public_rows, labelled_rows


@pytest.fixture
def make(make_args):
    def made(model, callbacks=(), **changes) -> ZOTrainer:
        parts = {"model_init": model} if not isinstance(model, torch.nn.Module) else {"model": model}
        return ZOTrainer(
            **parts,
            args=make_args(max_steps=3, **changes),
            train_dataset=labelled_rows(20),
            data_collator=DataCollatorWithPadding(word_tokenizer()),
            probe_rows=few_public_rows(),
            callbacks=list(callbacks),
        )

    return made


def adapted(base):
    return get_peft_model(load(base), LoraConfig(**LORA))


def trained(make, model, **changes) -> ZOTrainer:
    trainer = make(model, **changes)
    trainer.train()
    trainer.save_model()
    return trainer


def copied_values(trainer, base):
    model = adapted(base)
    model.load_state_dict(trainer.model.state_dict())
    return model


def copied_layer(trainer, base):
    """Whoever copies a single layer of what was trained goes on from it too."""
    model = adapted(base)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default"
    model.get_submodule(name).load_state_dict(trainer.model.get_submodule(name).state_dict())
    return model


def loaded(trainer, base, folder=""):
    return PeftModel.from_pretrained(load(base), f"{trainer.args.output_dir}/{folder}", is_trainable=True)


def around_what_is_left(trainer, base):
    """A new adapter on the model into which the trained one was merged."""
    return get_peft_model(trainer.model.merge_and_unload(), LoraConfig(**LORA))


SOURCES = {
    "the same": lambda trainer, base: trainer.model,
    "a copy": lambda trainer, base: copy.deepcopy(trainer.model),
    "a pickle": lambda trainer, base: pickle.loads(pickle.dumps(trainer.model)),
    "its values": copied_values,
    "one layer's values": copied_layer,
    "its folder": loaded,
    "its folder, by another name": lambda trainer, base: PeftModel.from_pretrained(
        load(base), trainer.args.output_dir, adapter_name="mine", is_trainable=True
    ),
    "a checkpoint": lambda trainer, base: loaded(trainer, base, "checkpoint-2"),
    "merged": around_what_is_left,
    "a copy of the merged": lambda trainer, base: copy.deepcopy(around_what_is_left(trainer, base)),
}


@pytest.mark.parametrize("way", ["argument", "attribute", "model_init"])
@pytest.mark.parametrize("source", SOURCES)
def test_an_adapter_that_was_trained_is_refused_wherever_it_comes_from(source, way, make, base):
    first = trained(make, adapted(base), save_strategy="steps", save_steps=2)
    model = SOURCES[source](first, base)
    if way == "attribute":
        trainer = make(adapted(base))
        trainer.model = trainer.model_wrapped = model
    else:
        trainer = make(model if way == "argument" else lambda: model)
    with pytest.raises(ValueError, match="model: another run has trained it"):
        trainer.train()


FULL = {
    "its folder": lambda trainer: load(trainer.args.output_dir),
    "its folder, under a new adapter": lambda trainer: get_peft_model(
        load(trainer.args.output_dir), LoraConfig(**LORA)
    ),
    "its folder, in 16 bits under a new adapter": lambda trainer: get_peft_model(
        type(one_layer()).from_pretrained(trainer.args.output_dir, dtype=torch.bfloat16),
        LoraConfig(**{**LORA, "task_type": None}),
    ),
    "the same, under a new adapter": lambda trainer: get_peft_model(trainer.model, LoraConfig(**LORA)),
}


@pytest.mark.parametrize("source", FULL)
def test_a_model_that_was_trained_is_refused_under_an_adapter_too(source, make, base):
    first = trained(make, load(base))
    with pytest.raises(ValueError, match="model: another run has trained it"):
        make(FULL[source](first), padded_lengths=[16]).train()


def test_a_model_that_a_run_without_noise_has_trained_is_refused_for_a_private_one(make, base):
    first = trained(make, adapted(base), method="mezo", noise_multiplier="absent", target_delta="absent")
    with pytest.raises(ValueError, match="model: another run has trained it"):
        make(loaded(first, base)).train()
    make(loaded(first, base), method="mezo", noise_multiplier="absent", target_delta="absent").train()


def test_weights_that_a_callback_kept_while_they_were_trained_are_refused_at_the_end_of_that_step(make, base):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    first = make(adapted(base), [Stop()])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    with pytest.raises(ValueError, match="model: another run has trained it"):
        make(copied_values(first, base)).train()


def test_what_no_run_has_led_to_is_taken(make, base):
    """The same base model, the same seed, a model that was only looked at, and the values that a run began with."""
    model = adapted(base)
    before = copy.deepcopy(model.state_dict())
    trained(make, model)
    again = adapted(base)
    again.load_state_dict(before)
    make(again).train()
    for _ in range(2):
        make(seeded_peft_model(load(base), LoraConfig(**LORA), seed=1)).train()


def test_a_run_goes_on_from_its_own_values(make, base, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    out = str(tmp_path / "out")
    model = seeded_peft_model(load(base), LoraConfig(**LORA), seed=1)
    with pytest.raises(KeyboardInterrupt):
        make(model, [Stop()], output_dir=out, save_strategy="steps", save_steps=1).train()
    again = seeded_peft_model(load(base), LoraConfig(**LORA), seed=1)
    make(again, output_dir=out, save_strategy="steps", save_steps=1).train(resume_from_checkpoint=True)
