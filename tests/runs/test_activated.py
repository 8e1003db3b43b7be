"""Runs of activated LoRA: what is trained is saved, resumed, replayed, verified, loaded and carded as any adapter."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
    default_data_collator,
)

from hf_dpzo import Trajectory, ZOTrainer, from_trajectory, replay_onto, seeded_peft_model
from hf_dpzo.card.model_card import render_card
from hf_dpzo.losses import GenerationReward
from hf_dpzo.models.activation import find_invocation
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian
from hf_dpzo.trainer.reporting import mark_failed_units
from hf_dpzo.trainer.seq2seq import ZOSeq2SeqTrainer, ZOSeq2SeqTrainingArguments
from hf_dpzo.verification.verify import verify

from support.activated import INVOCATION, activated_model, activated_rows, alora, right_collator
from support.models import causal_lm, classifier, word_tokenizer
from support.rows import few_public_rows, labelled_rows
from support.runs import SHORT_RUN, short_args


STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    causal_lm(num_hidden_layers=1).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def build(folder, base, *, rows=None, model=None, changes=None, **passed) -> ZOTrainer:
    settings = {"max_steps": STEPS, "logging_steps": 100, **(changes or {})}
    return ZOTrainer(
        model=model or activated_model(LlamaForCausalLM.from_pretrained(base)),
        args=short_args(**{"output_dir": folder, **settings}),
        train_dataset=rows or activated_rows(20),
        data_collator=right_collator(),
        **{"probe_rows": activated_rows(2, seed=9).to_list(), **passed},  # By default more are made up.
    )


@pytest.fixture
def make(base, tmp_path):
    return lambda **passed: build(tmp_path / "out", base, **passed)


class At(TrainerCallback):
    def __init__(self, step, work) -> None:
        self.step, self.work = step, work

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.work()


def stop():
    raise KeyboardInterrupt


def failing(folder, base) -> list[str]:
    return [finding.detail for finding in verify(folder, base=str(base)) if not finding.holds]


@pytest.fixture(scope="module")
def published(base, tmp_path_factory):
    """A run that was killed, went on, and saved what it trained."""
    folder = tmp_path_factory.mktemp("published")
    changes = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0}
    with pytest.raises(KeyboardInterrupt):
        build(folder, base, changes=changes, callbacks=[At(2, stop)]).train()
    trainer = build(folder, base, changes=changes)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return trainer, folder


def test_a_killed_run_goes_on_and_verifies(published, base):
    _, folder = published
    assert len(Trajectory.read(folder).records) == STEPS
    assert failing(folder, base) == []
    assert failing(folder / "checkpoint-1", base) == []


def test_a_log_leads_to_the_weights(published, base):
    trainer, folder = published
    fresh = activated_model(LlamaForCausalLM.from_pretrained(base))
    replay_onto(fresh, Trajectory.read(folder))
    own = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in fresh.named_parameters())
    rebuilt = from_trajectory(folder, base=str(base))
    assert find_invocation(rebuilt) == find_invocation(trainer.model) == tuple(INVOCATION)
    assert all(torch.equal(parameter, own[name]) for name, parameter in rebuilt.named_parameters())


def test_the_loader_that_the_card_names_activates_it_and_that_of_transformers_does_not(published, base):
    trainer, folder = published
    row = {"input_ids": torch.tensor([[9, 8, *INVOCATION, 7]])}
    with torch.no_grad():
        expected = trainer.model.eval()(**row).logits
        plain = LlamaForCausalLM.from_pretrained(base)(**row).logits
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(folder).eval()(**row).logits, expected)
        # When this fails, transformers activates adapters itself, and cards need not warn of it.
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(**row).logits, plain)
    assert not torch.equal(plain, expected)


def test_the_code_of_the_card_runs(published, base):
    trainer, folder = published
    card = (folder / "README.md").read_text()
    code = card.partition("## Use it")[2].partition("```python\n")[2].partition("```")[0]
    names = {}
    for name, value in {"FOLDER_OR_REPOSITORY": folder, "WHERE_THE_BASE_MODEL_IS": base, "PROMPT": "w3 w4"}.items():
        code = code.replace(name, str(value))
    exec(code, names)
    assert names["prompt"].tolist()[0][-2:] == INVOCATION
    assert torch.equal(names["output"], trainer.model.eval().generate(names["prompt"], max_new_tokens=64))
    assert "use_cache=False" in card


def test_a_card_names_the_loader_that_finds_the_base_and_only_cards_of_activated_adapters_do(published):
    said = json.loads((published[1] / "privacy.json").read_text())
    assert said["training"]["invocation"] == INVOCATION
    said["reproducibility"]["base_model"]["revision"] = "0" * 40
    weights = ["adapter_model.safetensors"]
    assert "AutoPeftModelForCausalLM.from_pretrained(" in str(render_card(said, weights))
    assert "model = hf_dpzo.from_trajectory" in str(render_card(said, [])).partition("## Use it")[2]
    del said["training"]["invocation"]
    ordinary = str(render_card(said, weights))
    assert "## Use it" not in ordinary and "AutoPeft" not in ordinary


# When this fails, PEFT generates so too, and cards need not warn of it.
def test_peft_does_not_generate_in_the_ways_that_cards_warn_of(published):
    model, prompt = published[0].model.eval(), torch.tensor([[9, 8, 7, *INVOCATION]])
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    right = model.generate(prompt, **settings)
    assert not torch.equal(model.generate(prompt, use_cache=False, **settings), right)
    assert not torch.equal(model.generate(prompt, prefill_chunk_size=2, **settings), right)
    with pytest.raises(ValueError, match="Beam search"):
        model.generate(prompt, num_beams=2, **settings)
    with pytest.raises(IndexError):
        model.generate(prompt, num_return_sequences=2, **{**settings, "do_sample": True})


def test_a_folder_whose_adapter_is_activated_elsewhere_does_not_verify(published, base, tmp_path):
    folder = shutil.copytree(published[1], tmp_path / "edited", ignore=shutil.ignore_patterns("checkpoint-*"))
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("alora_invocation_tokens", "alora_invocation_tokenz"))
    assert any("alora_invocation_tokens" in detail for detail in failing(folder, base))
    config = json.loads((published[1] / "adapter_config.json").read_text())
    path.write_text(json.dumps({**config, "alora_invocation_tokens": INVOCATION[::-1]}))
    assert any("alora_invocation_tokens" in detail for detail in failing(folder, base))


@pytest.fixture
def everybody(monkeypatch):
    """The sums that noise would be added to, with everybody in each batch."""
    seen = []
    monkeypatch.setattr(DiscreteGaussian, "add", lambda one, values: seen.append(values) or values)
    monkeypatch.setattr(BernoulliSampler, "draw", lambda mask: np.ones(mask.size, dtype=bool))
    return seen


def test_several_points_in_one_pass_release_what_one_after_the_other_does(make, everybody, tmp_path):
    changes = {"method": "aggzo", "num_directions": 3, "max_steps": 1, "expected_batch_size": 20}
    make(changes=changes).train()
    plain = everybody.copy()
    everybody.clear()
    make(changes={**changes, "points_per_pass": 4, "output_dir": tmp_path / "second"}).train()
    np.testing.assert_allclose(everybody, plain, rtol=1e-3, atol=2**22)
    assert np.abs(plain).max() > 2**30


def test_rows_without_the_invocation_contribute_nothing_and_move_no_other_row(make, everybody, tmp_path):
    rows = activated_rows(20, without=frozenset([3, 11]))
    changes = {"max_steps": 1, "expected_batch_size": 20, "per_device_train_batch_size": 4, "padded_lengths": [16]}
    make(rows=rows, changes=changes).train()
    kept = rows.select([number for number in range(20) if number not in (3, 11)])
    make(rows=kept, changes={**changes, "output_dir": tmp_path / "second", "expected_batch_size": 18}).train()
    assert everybody[0] == everybody[1] != [0]


def test_no_hook_is_left_by_rows_that_fail_and_each_counts_as_failing(make, everybody):
    rows = activated_rows(20).to_list()
    rows[5]["input_ids"][0] = 1000  # No token of the vocabulary.
    rows[9]["input_ids"][-3] = 5  # No invocation.
    trainer = make(rows=type(activated_rows(20)).from_list(rows), changes={"expected_batch_size": 20})
    trainer.train()
    assert all(not module._forward_pre_hooks for module in trainer.model.modules())
    batch = next(iter(trainer._loader))["batch"]
    losses = trainer._estimate.losses(trainer.model, batch)
    assert mark_failed_units(losses, batch).sum() == 2


def test_users_are_units_and_shapes_are_public(make, base, tmp_path):
    rows = activated_rows(20).add_column("user", [f"u{number // 2}" for number in range(20)])
    changes = {"privacy_unit_column": "user", "padded_lengths": [8, 16], "expected_batch_size": 5}
    trainer = make(rows=rows, changes=changes, probe_rows=None)
    trainer.train()
    trainer.save_model()
    assert failing(tmp_path / "out", base) == []
    assert trainer._isolation.loss_change == 0


def test_public_rows_without_the_invocation_are_refused(make):
    with pytest.raises(ValueError, match=r"^probe_rows: 1 of its 4 rows do not hold alora_invocation_tokens"):
        make(probe_rows=activated_rows(4, without=frozenset([2])).to_list()).train()
    changes = {"eval_data_is_public": True}
    with pytest.raises(ValueError, match=r"^eval_dataset: 2 of its 6 rows do not hold alora_invocation_tokens"):
        make(eval_dataset=activated_rows(6, without=frozenset([1, 2])), changes=changes).train()
    with pytest.raises(ValueError, match="the first rows of train_dataset do not hold them"):
        make(rows=activated_rows(20, without=frozenset(range(8)))).train()
    with pytest.raises(ValueError, match=r"^padded_lengths=\[1\]: none has room for the 2 tokens"):
        make(changes={"padded_lengths": [1]}, probe_rows=None).train()


def calls_inside(model, inputs):
    logits = model.get_base_model()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return logits[:, -1].logsumexp(dim=-1)


def passes_embeddings(model, inputs):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits[:, -1].logsumexp(dim=-1)


@pytest.mark.parametrize("loss", [calls_inside, passes_embeddings])
def test_a_loss_that_never_activates_the_adapter_is_refused(loss, make):
    with pytest.raises(ValueError, match="the adapter moved nothing that the model computes"):
        make(per_example_loss=loss).train()


def test_an_own_loss_that_calls_the_model_is_not_refused(make):
    def loss(model, inputs):
        mask = inputs["attention_mask"]
        logits = model(input_ids=inputs["input_ids"], attention_mask=mask).logits
        return (logits.logsumexp(dim=-1) * mask).sum(dim=1)

    make(per_example_loss=loss, changes={"max_steps": 1}).train()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (alora(alora_invocation_tokens=[]), "no tokens activate"),
        (alora(alora_invocation_tokens=[5, 64]), "64 is none of the 64 tokens"),
        (alora(alora_invocation_tokens=[-1]), "-1 is none of the 64 tokens"),
        (alora(alora_invocation_tokens=[5.0]), "5.0 is none of the 64 tokens"),
    ],
)
def test_tokens_that_can_not_activate_are_refused(config, sentence, make):
    with pytest.raises(ValueError, match=sentence):
        make(model=seeded_peft_model(causal_lm(num_hidden_layers=1), config, seed=3)).train()


def test_tokens_that_pad_rows_are_refused(make):
    rows = activated_rows(20).map(lambda row: {"input_ids": [token % 46 for token in row["input_ids"]]})
    model = activated_model(alora_invocation_tokens=[0])
    with pytest.raises(ValueError, match="rows are padded with 0 too"):
        make(rows=rows, model=model, probe_rows=None).train()
    alone = {"per_device_train_batch_size": 1, "max_steps": 1}
    make(rows=rows, model=model, changes=alone, probe_rows=rows.to_list()[:2]).train()


@pytest.mark.filterwarnings("ignore")  # PEFT warns of it when the configuration is made.
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_of_another_task_is_refused(task, make_args):
    config = LoraConfig(task_type=task, r=2, target_modules=["q_proj"], alora_invocation_tokens=[5])
    model = seeded_peft_model(classifier() if task else causal_lm(), config, seed=3)
    with pytest.raises(ValueError, match=f"task_type={task} PEFT never activates"):
        ZOTrainer(model=model, args=make_args(), train_dataset=labelled_rows(8), probe_rows=few_public_rows())


def test_it_evaluates_and_predicts_what_peft_computes(published):
    trainer, _ = published
    rows = activated_rows(6, seed=4)
    metrics = trainer.evaluate(rows)
    scores = trainer.predict(rows).predictions
    inputs = right_collator()(rows.to_list())
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    np.testing.assert_allclose(scores[0][:5], expected[0, :5].numpy(), atol=1e-5)
    assert metrics["eval_loss"] > 0


def test_a_layer_that_gets_the_tokens_of_all_rows_as_one_list_is_refused(make):
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16)).eval()
    with pytest.raises(ValueError, match="the layer from 16 to 32 numbers gets the tokens of all rows as one list"):
        make(model=activated_model(opt, target_modules=["fc1"])).train()


@pytest.mark.parametrize("beams", [1, 2])
def test_texts_are_predicted_with_one_beam(beams, base, tmp_path):
    args = ZOSeq2SeqTrainingArguments(
        **{
            **SHORT_RUN,
            "output_dir": str(tmp_path),
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "method": "dpzero",
        },
        predict_with_generate=True,
        generation_max_length=18,
        generation_num_beams=beams,
    )
    trainer = ZOSeq2SeqTrainer(
        model=activated_model(LlamaForCausalLM.from_pretrained(base)),
        args=args,
        train_dataset=activated_rows(20),
        data_collator=right_collator(),
        processing_class=word_tokenizer(),
        probe_rows=activated_rows(2, seed=9).to_list(),
    )
    if beams > 1:
        with pytest.raises(ValueError, match="generation_num_beams=2: PEFT does no beam search"):
            trainer.train()
        return
    trainer.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    row = activated_rows(1, seed=4)
    predicted = trainer.predict(row).predictions[0]
    prompt = torch.tensor([row[0]["input_ids"]])
    expected = trainer.model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_length=18)[0]
    assert predicted[: len(expected)].tolist() == expected.tolist()
    with trainer.model.disable_adapter():
        base = trainer.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=18)[0]
    assert base.tolist() != expected.tolist()


def test_rewards_of_generated_texts_train_it(make, tmp_path):
    prompts = [" ".join(f"w{(7 * i + 3 * j) % 40}" for j in range(2 + i % 5)) for i in range(24)]
    rows = Dataset.from_list([{"prompt": f"{prompt} very :"} for prompt in prompts])

    def count_words(completions, **columns):
        return [float(len(set(text.split()))) for text in completions]

    settings = {"padded_lengths": [16], "smoothing": 0.3, "max_steps": 1}
    spread = causal_lm(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in spread.parameters():
            parameter.normal_(0, 0.3)
    trainer = make(
        model=activated_model(spread),
        rows=rows,
        probe_rows=rows.to_list()[:4],
        per_example_loss=GenerationReward(count_words, 4),
        processing_class=word_tokenizer(),
        changes=settings,
    )
    trainer.train()
    assert trainer._isolation.loss_change == 0
    with pytest.raises(ValueError, match=r"^eval_dataset: 1 of its 4 rows do not hold"):
        make(
            rows=rows,
            probe_rows=None,
            eval_dataset=Dataset.from_list([{"prompt": "w1"}, *rows.to_list()[:3]]),
            per_example_loss=GenerationReward(count_words, 4),
            processing_class=word_tokenizer(),
            changes={**settings, "eval_data_is_public": True, "output_dir": tmp_path / "second"},
        ).train()


def test_a_collator_that_cannot_pad_collates_rows_of_one_length(tmp_path):
    rows = Dataset.from_list([row for row in activated_rows(60) if len(row["input_ids"]) == 9])
    trainer = ZOTrainer(
        model=activated_model(),
        args=short_args(tmp_path, max_steps=1, expected_batch_size=4),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train()
    assert len(Trajectory.read(tmp_path).records) == 1
