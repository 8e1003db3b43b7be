"""Objectives without a gradient: training on them, what may flip by rounding, and what is said before that."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, TaskType
from torch.nn.functional import one_hot
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_dpzo import ZOTrainer, seeded_peft_model
from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.isolation.watched import changes_in_jumps
from hf_dpzo.losses import GenerationReward, MetricLoss
from hf_dpzo.losses.generation import Generation
from hf_dpzo.losses.heads import as_loss
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.trainer.objective import warn_of_flat_objective
from hf_dpzo.verification.verify import verify

from support.models import causal_lm, classifier, with_lora, word_tokenizer
from support.rows import few_public_rows, labelled_rows
from support.runs import short_args


ALONE = {"per_device_train_batch_size": 1}
PADDED = {"padded_lengths": [8]}


def rows(count: int, shift: int = 0) -> Dataset:
    """Rows of a prompt and an answer, as for GRPO."""
    return Dataset.from_list(
        [
            {"prompt": " ".join(f"w{(i * 7 + j * 3 + shift) % 40}" for j in range(2 + i % 5)), "answer": f"w{i % 40}"}
            for i in range(count)
        ]
    )


def count_words(prompts, completions, answer, **columns):
    """A reward function as TRL documents them."""
    rewards = [float(right in completion) for completion, right in zip(completions, answer, strict=True)]
    return [reward + len(set(text.split())) for reward, text in zip(rewards, completions, strict=True)]


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Give the weights a size at which generated texts vary."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def t5() -> T5ForConditionalGeneration:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(**sizes, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)
    ).eval()


def small_lm() -> torch.nn.Module:
    return spread(causal_lm(num_hidden_layers=1))


def padding_right() -> PreTrainedTokenizerFast:
    """Encoders take no other padding; decoders are given it on the left in any case."""
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.padding_side = "right"
    return tokenizer


KINDS = {
    "causal": (small_lm, AutoModelForCausalLM),
    "seq2seq": (t5, AutoModelForSeq2SeqLM),
}


def make(tmp_path, *, loss=None, model=None, tokenizer=None, **changes) -> ZOTrainer:
    return ZOTrainer(
        model=model or with_lora(small_lm(), TaskType.CAUSAL_LM),
        args=short_args(tmp_path / "run", **{"max_steps": 1, "eval_data_is_public": True, **changes}),
        train_dataset=rows(12),
        eval_dataset=rows(3, shift=1),
        processing_class=tokenizer or word_tokenizer(),
        per_example_loss=loss or GenerationReward(count_words, 3),
    )


# ---- Heads, and all that is done with them ----


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A run on a reward, from a base that is on disk, with its folder and its kind."""
    build, auto_class = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    spread(build()).save_pretrained(folder / "base")
    model = auto_class.from_pretrained(folder / "base")
    trainer = make(folder, model=model, tokenizer=padding_right(), **PADDED)
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return trainer, before, folder, auto_class


def test_rewards_are_trained_on_bit_by_bit_in_public_shapes(run):
    trainer, before, _, auto_class = run
    assert trainer.state.global_step == 1 and before["eval_reward"] == -before["eval_loss"] > 0
    base = auto_class.from_pretrained(run[2] / "base")
    assert any(not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), base.parameters(), strict=True))
    assert trainer._environment["isolation"] == {"status": "bitwise", "bound_in_clip_norms": 0.0}


def test_predictions_are_tokens_that_are_generated_once(run, monkeypatch):
    trainer, *_ = run
    calls = []
    generate = Generation.generate
    monkeypatch.setattr(Generation, "generate", lambda *args, **options: calls.append(1) or generate(*args, **options))
    predicted = trainer.predict(rows(3, shift=1))
    assert predicted.predictions.shape == (3, 3) and predicted.metrics["test_reward"] == -predicted.metrics["test_loss"]
    assert len(calls) == 1, "three rows are one batch"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(predicted.metrics["test_loss"])


def test_the_trained_model_reloads_and_generates_the_same(run):
    trainer, _, folder, auto_class = run
    loaded = auto_class.from_pretrained(folder / "run")
    expected = trainer.predict(rows(3, shift=1)).predictions
    trainer.model, ours = loaded, trainer.model
    trainer.model_wrapped = loaded
    again = trainer.predict(rows(3, shift=1)).predictions
    trainer.model = trainer.model_wrapped = ours
    assert (again == expected).all()


def test_a_run_on_a_reward_is_verified(run):
    _, _, folder, _ = run
    assert not {one.name: one.detail for one in verify(folder / "run", base=str(folder / "base")) if one.holds is False}


def test_adapters_train_one_row_at_a_time_and_reload(tmp_path):
    small_lm().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = seeded_peft_model(base, with_lora(causal_lm(), TaskType.CAUSAL_LM).peft_config["default"], seed=0)
    trainer = make(tmp_path, model=model, loss=MetricLoss("token_f1", max_new_tokens=2, reference="answer"), **ALONE)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_accuracy_of_classes_is_trained_on_and_evaluated(tmp_path):
    trainer = ZOTrainer(
        model=with_lora(classifier()),
        args=short_args(tmp_path, max_steps=1, padded_lengths=[16]),
        train_dataset=labelled_rows(12),
        eval_dataset=labelled_rows(8, seed=1),
        processing_class=word_tokenizer(),
        per_example_loss=MetricLoss("accuracy"),
    )
    trainer.train()
    predicted = trainer.predict(labelled_rows(8, seed=1))
    right = (predicted.predictions.argmax(axis=1) == predicted.label_ids).mean()
    assert predicted.metrics["test_loss"] == pytest.approx(-right)
    assert trainer._environment["isolation"]["status"] == "bitwise"


def test_columns_are_kept_for_the_reward_whatever_is_said_of_unused_ones(tmp_path):
    seen = []

    def reward(completions, answer, **columns):
        seen.append((answer[0], columns["trainer_state"].max_steps, sorted(columns)))
        return [1.0 + len(seen) % 2 * 0]

    make(tmp_path, loss=GenerationReward(reward, 2), remove_unused_columns=True, **ALONE).evaluate()
    assert [answer for answer, *_ in seen] == [f"w{i}" for i in range(3)]
    assert seen[0][2] == ["completion_ids", "log_extra", "log_metric", "prompts", "trainer_state"]


def test_a_row_that_fails_counts_as_zero_and_nothing_tells(tmp_path, sums, capfd, caplog):
    """With everybody in the batch and no noise, the sum lacks what the failing row would have added."""

    def fails(prompts, completions, answer, **columns):
        if answer[0] == "w7":
            raise ValueError(f"a secret about {prompts[0]}")
        return count_words(prompts, completions, answer)

    def without(prompts, completions, answer, **columns):
        return [None] if answer[0] == "w7" else count_words(prompts, completions, answer)

    releases = []
    for number, reward in enumerate((fails, without)):
        torch.manual_seed(0)
        loss = GenerationReward(reward, 3)
        trainer = make(tmp_path / str(number), loss=loss, smoothing=2.0, **ALONE)
        trainer.train()
        releases.append(list(sums))
        sums.clear()
    shown = "".join(capfd.readouterr()) + caplog.text
    assert releases[0] == releases[1] and any(any(step) for step in releases[0])
    assert "secret" not in shown and "ValueError" not in shown


# ---- What may flip ----


def errors(model, inputs):
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return (model(**arguments).logits.argmax(dim=1) != inputs["labels"]).float()


def classify(tmp_path, loss, **changes) -> ZOTrainer:
    return ZOTrainer(
        model=with_lora(spread(classifier())),
        args=short_args(tmp_path, max_steps=1, **changes),
        train_dataset=labelled_rows(12),
        processing_class=word_tokenizer(),
        per_example_loss=loss,
    )


@pytest.mark.parametrize("loss", [MetricLoss("accuracy"), errors], ids=["metric", "function"])
def test_what_changes_in_jumps_is_refused_where_neighbours_choose_the_shape(tmp_path, loss):
    with pytest.raises(ValueError, match="set padded_lengths, or per_device_train_batch_size=1"):
        classify(tmp_path, loss).train()


@pytest.mark.parametrize("changes", [ALONE, {"padded_lengths": [24]}], ids=["alone", "padded"])
def test_functions_that_change_in_jumps_train_where_nothing_can_flip(tmp_path, changes):
    trainer = classify(tmp_path, errors, **changes)
    trainer.train()
    assert trainer._environment["isolation"]["status"] == "bitwise"


def test_generated_text_is_refused_where_neighbours_choose_the_shape(tmp_path):
    with pytest.raises(ValueError, match="rounding may flip a token"):
        make(tmp_path).train()


def test_without_privacy_nothing_is_asked_for(tmp_path):
    make(tmp_path, method="mezo", noise_multiplier="absent", target_delta="absent").train()


def test_jumps_are_told_from_what_is_continuous():
    """Also from a loss with a kink, which is flat for some rows, and from one that nearly vanishes."""

    def hinge(model, inputs):
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = model(**arguments).logits
        return (1 - (logits * (2 * one_hot(inputs["labels"], 2) - 1)).sum(dim=1)).clamp(min=0)

    def constant(model, inputs):
        return 0.0 * errors(model, inputs)

    def vanishing(model, inputs):
        """Of a row that is classified with all certainty: rounded like 1, it moves in steps of its own size."""
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        margins = 8 + 6 * torch.tanh(model(**arguments).logits[:, 0])
        return torch.log(1 + torch.exp(-margins))

    model = with_lora(spread(classifier()))
    collator = LogicalBatchCollator(collate=DataCollatorWithPadding(word_tokenizer()), micro_batch_size=4)
    parts = {"collator": collator, "prepare": lambda inputs: inputs, "device": torch.device("cpu")}
    for loss, jumps in ((None, False), (hinge, False), (vanishing, False), (errors, True), (constant, False)):
        losses = BatchLosses(loss=as_loss(loss, model), **parts)
        assert changes_in_jumps(model, losses, [labelled_rows(8).to_list()]) is jumps, loss


def test_outputs_that_neighbours_round_are_refused_though_no_token_flips(tmp_path, monkeypatch):
    """A model that adds a hair of its neighbours to each row: all tokens stay, and the claim would be wrong."""
    trainer = make(tmp_path, **PADDED)
    layer = trainer.model.base_model.model.lm_head
    layer.register_forward_hook(lambda module, args, output: output + 1e-7 * output.mean().nan_to_num() * output.sign())
    with pytest.raises(ValueError, match="neighbours moved the model's outputs by rounding"):
        trainer.train()


def test_lengths_of_neighbours_do_not_choose_the_kernel(monkeypatch):
    """transformers leaves out a mask that masks nothing, and attention may then be computed by other kernels."""
    generation = Generation(tokenizer=word_tokenizer(), max_new_tokens=2)
    masked = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(*args, attn_mask=None, **options):
        masked.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    row, all_of_it = torch.arange(4, 12), torch.ones(8, dtype=torch.long)
    for other in (all_of_it, (torch.arange(8) > 3).long()):
        inputs = {"input_ids": torch.stack([row, row]), "attention_mask": torch.stack([all_of_it, other])}
        generation.generate(small_lm(), inputs)
    assert len(masked) == 4 and all(masked)


# ---- What is said before anything is spent ----


def warnings_of(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_dpzo"), "propagate", True)
    return caplog


def test_an_objective_that_is_always_the_same_is_warned_of_before_a_step(tmp_path, heard):
    trainer = make(tmp_path, loss=GenerationReward(lambda **columns: [0.5], 2), **ALONE)
    trainer.train()
    told = warnings_of(heard)
    assert "it is the same on all 3 public rows" in told and "smoothing=0.01" in told


def test_an_objective_that_does_not_move_is_warned_of(tmp_path, heard):
    make(tmp_path, smoothing=1e-6, learning_rate=1.0, **ALONE).train()
    told = warnings_of(heard)
    assert "same at both probe points" in told and "raise smoothing" in told
    assert "it is the same on all" not in told


def test_an_objective_that_moves_is_not_warned_of(tmp_path, heard):
    make(tmp_path, smoothing=0.3, **ALONE).train()
    assert "public rows" not in warnings_of(heard)


def test_trying_an_objective_leaves_the_weights_as_they_were(tmp_path):
    trainer = make(tmp_path, model=small_lm(), **ALONE)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    kept = {}

    def stop(model):
        super(type(trainer), trainer)._inspect(model)
        kept.update({name: torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()})

    trainer._inspect = stop
    trainer.train()
    assert kept and all(kept.values())


def test_private_rows_are_not_tried_before_training(tmp_path, heard):
    """Without public rows there is nothing to say, and texts cannot be made up."""
    trainer = make(tmp_path, loss=GenerationReward(lambda **columns: [0.5], 2), **ALONE)
    trainer.args.eval_data_is_public = False
    with pytest.raises(ValueError, match="pass probe_rows"):
        trainer.train()
    assert "public rows" not in warnings_of(heard)


def test_a_warning_names_what_was_seen(heard):
    warn_of_flat_objective(torch.tensor([-1.0, -1.0]), moves=True, smoothing=0.1)
    warn_of_flat_objective(torch.tensor([-1.0, 0.0]), moves=True, smoothing=0.1)
    assert warnings_of(heard).count("per_example_loss=-1") == 1


def test_public_rows_of_the_user_come_before_those_of_the_evaluation(tmp_path):
    trainer = make(tmp_path, **ALONE)
    assert [row["prompt"] for row in trainer._list_public_rows(9)] == rows(3, shift=1)["prompt"]
    trainer.probe_rows = rows(3, shift=2).to_list()
    assert [row["prompt"] for row in trainer._list_public_rows(2)] == rows(2, shift=2)["prompt"]
    assert few_public_rows()
