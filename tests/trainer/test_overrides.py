"""Hooks that training would ignore are refused by name, whoever overrides them; what the next class takes is passed."""

import functools
import inspect

import pytest
import torch
import trl
from datasets import Dataset
from transformers import DataCollatorWithPadding, Seq2SeqTrainer, Trainer

from hf_dpzo import ZOTrainer
from hf_dpzo.trainer.overrides import REPLACED_ATTRIBUTES, REPLACED_HOOKS, SHADOWED_HOOKS, refuse_overrides
from hf_dpzo.trl import ZOSFTConfig, ZOSFTTrainer

from support.models import causal_lm, one_layer, word_tokenizer
from support.rows import few_public_rows, labelled_rows


ROWS = labelled_rows(20)


def ignored(self, *args, **options):
    pytest.fail("nobody calls it")


# It is called, whatever it is.
OUR_STEP = (ZOTrainer, "training_step")


def with_hook(name: str, *bases: type) -> type:
    return type("Mine", bases, {name: ignored})


@pytest.fixture
def make(make_args):
    def made(kind=ZOTrainer, **changes) -> ZOTrainer:
        parts = {
            "model": one_layer(),
            "args": make_args(max_steps=1, expected_batch_size=4),
            "train_dataset": ROWS,
            "data_collator": DataCollatorWithPadding(word_tokenizer()),
            "probe_rows": few_public_rows(),
        }
        return kind(**{**parts, **changes})

    return made


def loss(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


# ---- Hooks ----


@pytest.mark.parametrize("name", REPLACED_HOOKS)
def test_a_hook_of_a_subclass_that_training_would_ignore_is_refused(make, name):
    with pytest.raises(ValueError, match=rf"^{name}=Mine\.{name}: .*; (remove|pass)"):
        make(with_hook(name, ZOTrainer))


@pytest.mark.parametrize("name", REPLACED_HOOKS)
def test_a_hook_of_a_mixin_is_refused(make, name):
    mixin = with_hook(name, object)
    for bases in ((mixin, ZOTrainer), (type("Between", (ZOTrainer,), {}), mixin)):
        with pytest.raises(ValueError, match=rf"^{name}=Mine\.{name}: "):
            make(type("Own", bases, {}))


@pytest.mark.parametrize("name", [*REPLACED_HOOKS, *SHADOWED_HOOKS])
def test_a_hook_of_a_trainer_that_ours_is_combined_with_is_refused(make, name):
    with pytest.raises(ValueError, match=rf"^{name}=Mine\.{name}: "):
        make(type("Joined", (ZOTrainer, with_hook(name, Trainer)), {}))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner in (ZOTrainer, Trainer) for name in REPLACED_HOOKS if (owner, name) != OUR_STEP],
)
def test_a_hook_that_was_put_into_a_class_of_ours_or_of_transformers_is_refused(make, monkeypatch, name, owner):
    monkeypatch.setattr(owner, name, ignored, raising=False)
    with pytest.raises(ValueError, match=rf"^{name}={owner.__name__}\.{name}: "):
        make()


@pytest.mark.parametrize("name", REPLACED_HOOKS)
def test_a_hook_that_the_instance_overrides_is_refused_before_anything_is_spent(make, name):
    trainer = make()
    setattr(trainer, name, functools.partial(ignored, trainer))
    with pytest.raises(ValueError, match=rf"^{name}=trainer\.{name}: "):
        trainer.train()
    assert not trainer.budget.ledger


@pytest.mark.parametrize("name", REPLACED_ATTRIBUTES)
def test_an_attribute_that_stock_reads_is_refused(make, name):
    trainer = make()
    setattr(trainer, name, ignored)
    with pytest.raises(ValueError, match=rf"^{name}=function: "):
        trainer.train()


def test_an_optimizer_or_a_schedule_that_is_put_in_place_is_refused(make):
    trainer = make()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(ValueError, match=r"^optimizer=SGD: the update is made by ZOOptimizer"):
        trainer.train()
    trainer = make()
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {})
    with pytest.raises(ValueError, match=r"^optimizer_cls_and_kwargs=SGD: the update is made by ZOOptimizer"):
        trainer.train()
    trainer = make()
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(trainer.model.parameters()))
    with pytest.raises(ValueError, match=r"^lr_scheduler=ConstantLR: "):
        trainer.train()


def test_a_loss_that_the_user_passes_replaces_that_of_a_combined_trainer_but_not_of_a_subclass(make):
    make(type("Joined", (ZOTrainer, with_hook("compute_loss", Trainer)), {}), per_example_loss=loss)
    with pytest.raises(ValueError, match=r"^compute_loss=Mine\.compute_loss: "):
        make(with_hook("compute_loss", ZOTrainer), per_example_loss=loss)


def test_hooks_that_have_an_effect_are_accepted(make):
    seen = []

    class Careful(ZOTrainer):
        def get_train_dataloader(self):
            seen.append("get_train_dataloader")
            return super().get_train_dataloader()

        def create_scheduler(self, *args, **options):
            seen.append("create_scheduler")
            return super().create_scheduler(*args, **options)

        def prediction_step(self, *args, **options):
            seen.append("prediction_step")
            return super().prediction_step(*args, **options)

        def log(self, *args, **options):
            seen.append("log")
            return super().log(*args, **options)

    trainer = make(Careful, eval_dataset=few_public_rows())
    trainer.train()
    trainer.evaluate()
    assert {*seen} == {"get_train_dataloader", "create_scheduler", "prediction_step", "log"}


def test_classes_of_transformers_may_be_combined():
    assert "prediction_step" in vars(Seq2SeqTrainer)
    combined = type("Joined", (ZOTrainer, Seq2SeqTrainer), {})
    refuse_overrides(object.__new__(combined), joined=None, replaces_loss=False)


@pytest.mark.parametrize("name", [*REPLACED_HOOKS, *SHADOWED_HOOKS])
def test_the_hooks_are_those_of_the_stock_trainer(name):
    """A hook that is called otherwise in a later version would be looked for in vain."""
    assert inspect.isfunction(getattr(Trainer, name))


# ---- Arguments ----


class FewArguments(Trainer):
    """Takes fewer arguments than stock, as DPOTrainer does."""

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None, *, extra=None):
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset)
        self.extra = extra


class AnyArguments(FewArguments):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)


@pytest.mark.parametrize("kind", [FewArguments, AnyArguments])
def test_only_arguments_that_the_next_class_takes_are_passed_on(make, kind):
    combined = type("Joined", (ZOTrainer, kind), {})
    assert make(combined, extra=3).extra == 3
    with pytest.raises(ValueError, match=rf"^compute_metrics: {kind.__name__} takes no such argument; remove it\.$"):
        make(combined, compute_metrics=ignored)


def test_an_optimizer_class_is_refused(make):
    with pytest.raises(ValueError, match=r"^optimizer_cls_and_kwargs: the update is made by ZOOptimizer"):
        make(optimizer_cls_and_kwargs=(torch.optim.SGD, {}))


# ---- TRL ----


def sft(tmp_path, kind=ZOSFTTrainer, config=ZOSFTConfig, **changes):
    private = {"noise_multiplier": 1.0, "target_delta": 1e-4, "expected_batch_size": 4, "max_steps": 1}
    rows = Dataset.from_list([{"prompt": f"w{i} ", "completion": "w1"} for i in range(8)])
    return kind(
        model=causal_lm(),
        args=config(str(tmp_path), report_to="none", use_cpu=True, **private),
        train_dataset=rows,
        processing_class=word_tokenizer(),
        **changes,
    )


@pytest.mark.parametrize("name", REPLACED_HOOKS)
def test_a_subclass_of_a_ready_class_obeys_the_same_rules(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{name}=Mine\.{name}: "):
        sft(tmp_path, with_hook(name, ZOSFTTrainer))
    between = with_hook(name, trl.SFTTrainer)
    with pytest.raises(ValueError, match=rf"^{name}=Mine\.{name}: "):
        sft(tmp_path, type("Joined", (ZOTrainer, between), {}))


def test_a_trainer_of_trl_whose_loss_is_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^class=Joined: ZOTrainer does not know the loss of one row of KTOTrainer"):
        sft(tmp_path, type("Joined", (ZOTrainer, trl.KTOTrainer), {}))


def test_arguments_without_the_fields_of_trl_are_refused(tmp_path):
    from hf_dpzo import ZOTrainingArguments

    with pytest.raises(ValueError, match=r"^args=ZOTrainingArguments: SFTTrainer reads the fields of SFTConfig"):
        sft(tmp_path, config=ZOTrainingArguments)


@pytest.mark.parametrize("other", [Seq2SeqTrainer, trl.SFTTrainer])
def test_a_trainer_that_comes_before_ours_is_refused_when_the_class_is_made(other):
    with pytest.raises(TypeError, match=rf"^Mine: {other.__name__} comes before ZOTrainer"):
        type("Mine", (other, ZOTrainer), {})
    type("Mine", (type("Mixin", (), {}), ZOTrainer, other), {})
