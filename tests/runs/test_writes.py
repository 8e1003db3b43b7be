"""What evaluating private rows writes reaches nothing that a run saves."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, RwkvConfig, RwkvForCausalLM, TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.isolation.probe import CoupledRowsError
from hf_dpzo.losses.function import FunctionLoss
from hf_dpzo.models.seal import BrokenSealError
from hf_dpzo.models.write_guard import ModelChangedError

from support.models import classifier, with_lora, word_tokenizer
from support.rows import few_public_rows, labelled_rows
from support.runs import released, short_args


# A token that no public row holds.
RARE = 63


class Writing(nn.Module):
    """An embedding that writes where it sees a token.

    Args:
        embedding: the embedding.
        write: what it does then, to itself.
        token: the token; `None` for any.
    """

    def __init__(self, embedding: nn.Module, write, token: int | None = RARE) -> None:
        super().__init__()
        self.embedding, self.token, self.write = embedding, token, write
        self.register_buffer("largest", torch.tensor(3.0))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, tokens):
        if self.token is None or (tokens == self.token).any():
            with torch.no_grad():
                self.write(self)
        return self.embedding(tokens)


def private_rows(count: int = 40) -> Dataset:
    rows = labelled_rows(count).to_list()
    rare = {"input_ids": [RARE] * 4, "attention_mask": [1] * 4, "labels": 1}
    return Dataset.from_list([*rows, *[rare | {"input_ids": [RARE, 5, 6, 7 + i]} for i in range(4)]])


def trainer_of(folder, model, *, rows=None, callbacks=(), tokenizer=None, **changes) -> ZOTrainer:
    tokenizer = tokenizer or word_tokenizer()
    return ZOTrainer(
        model=model,
        args=short_args(folder, **{"expected_batch_size": 22, "remove_unused_columns": False, **changes}),
        train_dataset=private_rows() if rows is None else rows,
        eval_dataset=labelled_rows(4, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        probe_rows=few_public_rows(),
        callbacks=list(callbacks),
    )


def writing(write, *, lora: bool, token: int | None = RARE) -> nn.Module:
    model = classifier()
    model.model.embed_tokens = Writing(model.model.embed_tokens, write, token)
    model = with_lora(model) if lora else model
    inner = next(module for module in model.modules() if isinstance(module, Writing))
    inner.__dict__["reach"] = first_trained(model)  # No parameter of its own.
    return model


def first_trained(model: nn.Module) -> nn.Parameter:
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


# ---- Buffers and configurations: put back ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_buffer_that_private_rows_write_into_is_saved_as_it_was(lora, tmp_path):
    def write(inner):
        inner.largest.add_(1)
        inner.register_buffer("positions", torch.zeros(9))

    trainer = trainer_of(tmp_path, writing(write, lora=lora))
    trainer.train()
    trainer.save_model()
    state = trainer.model.state_dict()
    (largest,) = [value for name, value in state.items() if name.endswith("largest")]
    assert largest.item() == 3.0
    assert not any("positions" in name for name in state)


def test_a_configuration_that_private_rows_write_into_is_saved_as_it_was(tmp_path):
    model = writing(lambda inner: setattr(model.config, "seen", RARE), lora=False)
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    trainer.save_model()
    assert "seen" not in json.loads((tmp_path / "config.json").read_text())


# ---- Weights ----


def learned_from(folder, rows, write, *, lora: bool) -> list[tuple[int, ...]]:
    """What a run of these rows releases. There is no noise, and everybody is in each batch."""
    torch.manual_seed(0)
    model = writing(write, lora=lora)
    trainer = trainer_of(folder, model, rows=rows, expected_batch_size=20, padded_lengths=[16])
    trainer.train()
    trainer.save_model()
    return released(folder)


@pytest.mark.parametrize("where", ["trained", "frozen"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rows_that_write_into_a_weight_contribute_nothing(lora, where, sums, tmp_path):
    """The run goes on, since its end would tell that there was such a row; and no other row's part moves."""

    def write(inner):
        weights = {"trained": inner.reach, "frozen": inner.frozen}
        weights[where].data.view(-1)[:1].add_(1e-3)

    rows = private_rows()
    with_rows = learned_from(tmp_path / "with", rows, write, lora=lora)
    without = learned_from(tmp_path / "without", rows.select(range(len(rows) - 4)), write, lora=lora)
    assert with_rows == without


def test_a_frozen_weight_that_is_written_into_below_torch_is_not_saved(tmp_path):
    model = writing(lambda inner: inner.frozen.detach().numpy().fill(3), lora=True)
    trainer = trainer_of(tmp_path, model, expected_batch_size=44)
    trainer.train()
    with pytest.raises(ValueError, match=r"frozen is not trained, and is another one than when the run began"):
        trainer.save_model()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_no_checkpoint_holds_a_frozen_weight_that_was_written_into(tmp_path):
    model = writing(lambda inner: inner.frozen.detach().numpy().fill(3), lora=False)
    trainer = trainer_of(tmp_path, model, expected_batch_size=44, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="frozen is not trained"):
        trainer.train()
    assert not list(tmp_path.rglob("model*.safetensors"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_write_below_torch_into_what_is_trained_stops_the_run_before_a_release(lora, tmp_path):
    model = writing(lambda inner: inner.reach.detach().numpy().fill(3), lora=lora)
    trainer = trainer_of(tmp_path, model, expected_batch_size=44)
    with pytest.raises(ModelChangedError, match="evaluating rows changes"):
        trainer.train()
    assert len(Trajectory.read(tmp_path).records) == 0
    with pytest.raises(ValueError, match="model: "):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


class Meddler(TrainerCallback):
    """Writes into a weight after the second step, behind torch's back."""

    def __init__(self, choose, event: str = "on_step_end") -> None:
        self._choose = choose
        setattr(self, event, self._meddle)

    def _meddle(self, args, state, control, model=None, **rest):
        if state.global_step == 2:
            self._choose(model).data.view(-1)[:1].add_(1e-3)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_callback_that_writes_into_what_is_trained_stops_the_run(event, lora, tmp_path):
    model = with_lora(classifier()) if lora else classifier()
    trainer = trainer_of(tmp_path, model, callbacks=[Meddler(first_trained, event)])
    with pytest.raises(BrokenSealError, match="something other than a step has changed what is trained"):
        trainer.train()


def test_a_change_after_training_is_not_saved(tmp_path):
    trainer = trainer_of(tmp_path, with_lora(classifier()))
    trainer.train()
    trainer.model.get_base_model().model.norm.weight.data.add_(1)
    with pytest.raises(ValueError, match=r"norm\.weight is not trained"):
        trainer.save_model()


def test_an_evaluation_that_writes_into_a_weight_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, writing(lambda inner: inner.frozen.add_(1), lora=True, token=None))
    with pytest.raises(ModelChangedError, match="frozen"):
        trainer.evaluate()


def test_a_hook_that_writes_is_found_by_the_probe(tmp_path):
    model = with_lora(classifier())
    norm = model.get_base_model().model.norm

    def rescale(module, args, output):
        norm.weight.data.mul_(1.001)

    norm.register_forward_hook(rescale)
    with pytest.raises(CoupledRowsError, match=r"changed .*norm\.weight|moved a row's loss"):
        trainer_of(tmp_path, model).train()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_model_that_rescales_itself_is_refused_and_left_as_it_was(lora, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32}
    model = RwkvForCausalLM(RwkvConfig(**sizes, num_hidden_layers=7))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["key", "value"]))
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8 + i], "labels": [5, 6, 7, 8 + i]} for i in range(30)])
    trainer = ZOTrainer(
        model=model,
        args=short_args(tmp_path, per_device_train_batch_size=1),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
    )
    with pytest.raises(CoupledRowsError, match=r"blocks\.6\..*weight.*rescale_every=0"):
        trainer.train()
    after = (model.get_base_model() if lora else model).state_dict()
    for name, value in after.items():
        if "lora" not in name:
            torch.testing.assert_close(value, before[name.replace(".base_layer", "")], rtol=0, atol=0)


# ---- What else is saved ----


# What a collator may write into, with what of it would be saved.
SAVED = {
    "a vocabulary": (lambda t, text: t.processing_class.add_tokens([text]), "tokenizer.json"),
    "a chat template": (lambda t, text: setattr(t.processing_class, "chat_template", text), "chat_template.jinja"),
    "what a tokenizer begins with": (
        lambda t, text: t.processing_class.init_kwargs.update(note=text),
        "tokenizer_config.json",
    ),
    "a configuration": (lambda t, text: setattr(t.model.config, "note", text), "config.json"),
    "a configuration's classes": (
        lambda t, text: setattr(t.model.config, "id2label", {0: text, 1: "b"}),
        "config.json",
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_a_collator_writes_is_not_saved(name, tmp_path):
    write, file = SAVED[name]
    tokenizer = copy.deepcopy(word_tokenizer())
    trainer = trainer_of(tmp_path, classifier(), tokenizer=tokenizer, save_strategy="steps", save_steps=2)
    collate = trainer.data_collator

    def writing_collator(rows):
        if any(RARE in row["input_ids"] for row in rows):
            write(trainer, "a secret")
        return collate(rows)

    trainer.data_collator = writing_collator
    trainer.train()
    trainer.save_model()
    saved = [path for path in tmp_path.rglob("*.json*") if "secret" in path.read_text()]
    assert not saved
    assert (tmp_path / file).exists() or name == "a chat template"


def test_the_length_of_a_batch_does_not_stay_in_a_tokenizer(tmp_path):
    """A fast tokenizer keeps, and saves, how it padded and truncated last."""
    tokenizer = copy.deepcopy(word_tokenizer())
    trainer = trainer_of(tmp_path, with_lora(classifier()), tokenizer=tokenizer)
    collate = trainer.data_collator

    def tokenizing(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        tokenizer(["w1 w2"], padding="max_length", max_length=longest, truncation=True)
        return collate(rows)

    trainer.data_collator = tokenizing
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None


def test_what_a_user_changes_after_training_is_saved(tmp_path):
    trainer = trainer_of(tmp_path, classifier())
    trainer.train()
    trainer.model.config.note = "public"
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "public"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "write",
    [
        lambda weight: setattr(weight, "data", weight.data + 1),
        lambda weight: weight.set_(torch.ones_like(weight)),
        lambda weight: weight.requires_grad_(False),
        lambda weight: setattr(weight, "data", weight.data.half()),
    ],
    ids=["data", "set", "frozen", "half"],
)
def test_rows_that_exchange_a_weight_contribute_nothing(write, lora, sums, tmp_path):
    rows = private_rows()
    with_rows = learned_from(tmp_path / "with", rows, lambda inner: write(inner.reach), lora=lora)
    without = learned_from(
        tmp_path / "without", rows.select(range(len(rows) - 4)), lambda inner: write(inner.reach), lora=lora
    )
    assert with_rows == without


def test_a_write_below_torch_into_many_trained_weights_stops_the_run(tmp_path):
    model = classifier(hidden_size=256, vocab_size=70_000, num_attention_heads=2)
    assert sum(p.nbytes for p in model.parameters()) > 1 << 26
    inner = Writing(model.model.embed_tokens, lambda inner: inner.embedding.weight.detach().numpy().fill(3))
    model.model.embed_tokens = inner
    trainer = trainer_of(tmp_path, model, expected_batch_size=44, max_steps=1)
    with pytest.raises(ModelChangedError):
        trainer.train()


def test_a_loss_that_writes_into_its_inputs_does_not_reach_the_next_probe_point(sums, tmp_path):
    seen = []

    def loss(model, inputs):
        seen.append(int(inputs["attention_mask"].max()))
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"].clone()).logits
        inputs["attention_mask"].fill_(7)
        return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    trainer = trainer_of(tmp_path, classifier(), padded_lengths=[16])
    trainer.per_example_loss = FunctionLoss(loss)
    trainer.train()
    assert set(seen) == {1}


def test_a_weight_decay_that_a_callback_changes_stops_the_run(tmp_path):
    class Decay(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **rest):
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.5

    trainer = trainer_of(tmp_path, with_lora(classifier()), callbacks=[Decay()])
    with pytest.raises(RuntimeError, match=r"weight_decay=0\.5: it was changed since the run began"):
        trainer.train()


def test_a_sound_run_saves_all_that_it_began_with(tmp_path):
    model = with_lora(classifier())
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    trainer = trainer_of(tmp_path, model, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert load_file(Path(tmp_path) / "adapter_model.safetensors")
    for name, value in trainer.model.state_dict().items():
        if name in before and "score" not in name:
            assert torch.equal(value, before[name])
