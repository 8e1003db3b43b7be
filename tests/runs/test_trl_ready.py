"""The ready classes of `hf_dpzo.trl` train, evaluate, save, verify and resume as `ZOTrainer` does; a pair is a row."""

import logging
import sys

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

import hf_dpzo.trl
from hf_dpzo import Trajectory, verify
from hf_dpzo.data.pairs import list_sequences
from hf_dpzo.losses.preference import DPOLoss

from support.joined import READY, build, lora, model_of, rows_of
from support.models import causal_lm, word_tokenizer


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="module", params=READY)
def trained(request, tmp_path_factory):
    """A run of two steps, with its base model, saved at both."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model_of(request.param).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    auto = AutoModelForSequenceClassification if request.param == "reward" else AutoModelForCausalLM
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        trainer = build(
            request.param,
            folder / "out",
            model=auto.from_pretrained(folder / "base"),
            args={**saving, "eval_data_is_public": True, "learning_rate": 0.1},
        )
        trainer.train()
        trainer.save_model()
    return request.param, trainer, folder


# ---- What outlives a run ----


def test_a_run_is_saved_and_verifies(trained):
    name, trainer, folder = trained
    assert len(Trajectory.read(folder / "out").records) == 2
    for saved in (folder / "out", folder / "out" / "checkpoint-1"):
        assert all(finding.holds for finding in verify(saved, base=str(folder / "base"))), saved
    card = (folder / "out" / "README.md").read_text()
    assert "differential-privacy" in card and "Quick start" not in card
    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder / "out")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_run_is_resumed_from_a_checkpoint_and_its_log(trained, tmp_path):
    name, trainer, folder = trained
    (tmp_path / "out").mkdir()
    log = tmp_path / "out" / "trajectory.zo"
    log.write_bytes((folder / "out" / "trajectory.zo").read_bytes())
    resumed = build(
        name,
        tmp_path / "out",
        model=type(trainer.model).from_pretrained(folder / "base"),
        args={"learning_rate": 0.1},
    )
    resumed.train(resume_from_checkpoint=True)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


def test_logs_hold_metrics_of_evaluations_and_none_of_training(trained):
    name, trainer, _ = trained
    logged = {key for log in trainer.state.log_history for key in log}
    shown = {"sft": set(), "reward": {"eval_accuracy", "eval_margin"}, "dpo": {"eval_rewards/accuracies"}}
    assert {"eval_loss", "epsilon", "learning_rate", *shown[name]} <= logged
    assert {key for key in logged if not key.startswith("eval_")} == {"epsilon", "learning_rate", "epoch", "step"}
    assert not any(trainer._metrics.values())  # What TRL would log next.


def test_evaluation_is_the_mean_over_rows(trained):
    """And the metrics of pairs are of all of them, in batches of any size."""
    name, trainer, _ = trained
    whole = trainer.evaluate()
    trainer.args.per_device_eval_batch_size, before = 4, trainer.args.per_device_eval_batch_size
    parts = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = before
    kept = [key for key in whole if not key.endswith(("_runtime", "_per_second"))]
    assert {key: parts[key] for key in kept} == pytest.approx({key: whole[key] for key in kept}, rel=1e-4, abs=1e-6)
    predicted = trainer.predict(trainer.eval_dataset)
    assert len(predicted.predictions) == 6
    if name != "sft":
        chosen, rejected = predicted.predictions.T
        accuracy = whole["eval_accuracy" if name == "reward" else "eval_rewards/accuracies"]
        assert accuracy == pytest.approx((chosen > rejected).mean())


def test_training_rows_are_not_evaluated_in_either_form(trained, tmp_path):
    name, _, _ = trained
    rows = rows_of(name, 24)
    trainer = build(name, tmp_path, rows=rows)
    for dataset in (rows, trainer.train_dataset):
        with pytest.raises(ValueError, match="eval_dataset: it is the training data"):
            trainer.evaluate(dataset)
    assert trainer.evaluate(rows_of(name, 3, first=50))["eval_loss"] > 0


# ---- A pair is one row ----


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_pairs_share_micro_batches_of_public_shapes(tmp_path, name):
    trainer = build(name, tmp_path, args={"padded_lengths": [8, 12], "per_device_train_batch_size": 3})
    batch = next(iter(trainer.get_train_dataloader()))["batch"]
    assert {tuple(micro.inputs["input_ids"].shape) for micro in batch.micro_batches} <= {(6, 8), (6, 12)}
    assert all(micro.size == 3 for micro in batch.micro_batches)
    assert len(trainer._units) == 24


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_made_up_pairs_are_of_two_different_texts(tmp_path, name):
    trainer = build(name, tmp_path)
    trainer.get_train_dataloader()
    (rows,) = trainer._public_batches
    texts = [list_sequences(row) for row in rows]
    assert all(chosen != rejected and len(chosen) > len(rejected) for chosen, rejected in texts)
    assert len({len(chosen) for chosen, _ in texts}) == 3


def test_pairs_that_move_each_other_are_refused(tmp_path):
    """The probe sees it also in the text that is not preferred."""

    class Joining(type(causal_lm())):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            half = len(output.logits) // 2
            rejected = output.logits[half:]
            output.logits = torch.cat([output.logits[:half], rejected - 0.1 * rejected.softmax(-1).mean(0)])
            return output

    trainer = build("dpo", tmp_path, model=Joining(causal_lm().config))
    with pytest.raises(ValueError, match=r"isolation: .* moved a row's loss"):
        trainer.train()


def test_the_rows_of_a_user_are_one_unit(tmp_path):
    rows = rows_of("reward", 24).add_column("user", [f"u{i // 3}" for i in range(24)])
    args = {"privacy_unit_column": "user", "max_rows_per_unit": 3, "expected_batch_size": 4, "max_steps": 1}
    trainer = build("reward", tmp_path, rows=rows, args=args)
    assert len(trainer._units) == 8
    trainer.train()


@pytest.mark.parametrize("name", READY)
def test_public_rows_may_be_in_the_format_of_the_users_rows(tmp_path, name):
    trainer = build(name, tmp_path, probe_rows=rows_of(name, 4).to_list())
    prepared = trainer.train_dataset[0]
    assert {*trainer.probe_rows[0]} == {*prepared}
    again = build(name, tmp_path, probe_rows=trainer.probe_rows)
    assert again.probe_rows == trainer.probe_rows


# ---- Private rows say nothing ----


def test_preparing_private_rows_shows_nothing_of_them(tmp_path, caplog, capfd):
    rows = [{"prompt": f"w{i} w", "completion": "2 secret"} for i in range(8)]  # Two halves of one token.
    with caplog.at_level(logging.WARNING):
        build("sft", tmp_path, rows=Dataset.from_list(rows), args={"expected_batch_size": 2}, eval_dataset=None)
    shown = capfd.readouterr()
    assert "prompt" not in caplog.text + shown.out + shown.err


@pytest.mark.parametrize("args", [{}, {"precompute_ref_log_probs": True}], ids=["at each point", "beforehand"])
def test_a_pair_on_which_the_reference_fails_contributes_nothing(tmp_path, args):
    rows = [{"prompt": f"w{i} ", "chosen": "w1", "rejected": "w2 w3"} for i in range(8)]
    rows[3]["chosen"] = "w39"  # Beyond the embeddings of the reference.
    public = [{"prompt": f"w{i} ", "chosen": "w3 w4", "rejected": "w5"} for i in range(4)]
    trainer = build(
        "dpo",
        tmp_path,
        rows=Dataset.from_list(rows),
        ref_model=causal_lm(vocab_size=20),
        eval_dataset=None,
        probe_rows=public,
        args={**args, "expected_batch_size": 8, "max_steps": 1},
    )
    trainer.get_train_dataloader()
    losses = []
    for row in trainer.train_dataset:
        kept = {name: value for name, value in row.items() if name in trainer._signature_columns}
        try:
            losses.append(trainer.per_example_loss(trainer.model, trainer.data_collator([kept])).item())
        except IndexError:
            losses.append(float("nan"))
    assert [index for index, loss in enumerate(losses) if loss != loss] == [3]
    trainer.train()
    assert len(trainer.budget.ledger) == 1


# ---- The reference ----


def test_an_adapter_that_is_trained_on_has_a_frozen_copy_for_a_reference(tmp_path):
    model = get_peft_model(causal_lm(), lora())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter", is_trainable=True)
    trainer = build("dpo", tmp_path / "out", model=model, args={"learning_rate": 1.0})
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if ".lora_" in key and ".default." in key}


def test_the_reference_of_a_whole_model_is_what_it_began_from(tmp_path):
    model = causal_lm()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = build("dpo", tmp_path, model=model, args={"learning_rate": 1.0})
    trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_at_several_points_at_once_the_reference_is_computed_beforehand(tmp_path):
    several = {"points_per_pass": 2}
    with pytest.raises(ValueError, match=r"points_per_pass=2: .*set precompute_ref_log_probs=True"):
        build("dpo", tmp_path, peft_config=lora(), args=several)
    args = {**several, "precompute_ref_log_probs": True, "max_steps": 1}
    build("dpo", tmp_path, peft_config=lora(), args=args).train()


def test_a_loss_of_the_user_replaces_that_of_trl(tmp_path):
    def loss(model, inputs):
        return model(inputs["input_ids"]).logits[:, 0].float().square().mean(dim=1).chunk(2)[0]

    trainer = build("dpo", tmp_path, per_example_loss=loss, args={"max_steps": 1})
    assert not isinstance(trainer.per_example_loss, DPOLoss)
    trainer.train()


def test_the_balance_of_experts_is_refused_unless_it_weighs_nothing(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.\d+: it weighs .* set 0"):
        build("sft", tmp_path, model=MixtralForCausalLM(config))
    build("sft", tmp_path, model=MixtralForCausalLM(config), args={"router_aux_loss_coef": 0.0})


# ---- Import ----


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "hf_dpzo.trl.sft")
    with pytest.raises(ModuleNotFoundError, match=r"^ZOSFTTrainer: .* pip install hf_dpzo\[trl\]\.$"):
        hf_dpzo.trl.ZOSFTTrainer  # noqa: B018 - looking it up imports it
