"""TRL's SFTTrainer, made private by inheritance."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType

from hf_dpzo import Trajectory, ZOTrainer, ZOTrainingArguments

from support.models import causal_lm


trl = pytest.importorskip("trl")


@dataclass
class PrivateSFTConfig(ZOTrainingArguments, trl.SFTConfig):
    """The flags of both."""


class PrivateSFTTrainer(ZOTrainer, trl.SFTTrainer):
    """Data sets, templates and masks of one, and the steps of the other."""


def rows(count: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"w{i % 40} w{i % 7}", "completion": f" w{i % 5} good"} for i in range(count)])


@pytest.fixture
def make(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def trainer(**changes) -> PrivateSFTTrainer:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "noise_multiplier": 1.0,
            "target_delta": 1e-4,
            "expected_batch_size": 8,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return PrivateSFTTrainer(
            model=causal_lm(),
            args=PrivateSFTConfig(**{**settings, **changes}),
            train_dataset=rows(40),
            eval_dataset=rows(6),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"]),
        )

    return trainer


def test_sft_trains_privately(make, tmp_path):
    trainer = make()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert len(Trajectory.read(tmp_path / "out").records) == 3
    assert len(trainer.budget.ledger) == 3


def test_only_completions_are_learned(make):
    """The masks of TRL reach the loss: prompts have no targets."""
    trainer = make()
    batch = next(iter(trainer.get_train_dataloader()))["batch"]
    labels = torch.cat([micro.inputs["labels"].flatten() for micro in batch.micro_batches])
    assert (labels != -100).any()
    assert {
        int((row["labels"] if "labels" in row else row["completion_mask"])[0]) for row in trainer.train_dataset
    } <= {-100, 0}


def test_logs_hold_no_training_metric_of_sft(make):
    trainer = make(eval_strategy="steps", eval_steps=2, eval_data_is_public=True)
    trainer.train()
    logged = {key for log in trainer.state.log_history for key in log}
    assert {"epsilon", "learning_rate", "eval_loss"} <= logged
    assert not {key for key in logged if "token" in key or "entropy" in key or key == "loss"}


def test_saved_card_is_that_of_a_private_run_and_verifies(make, tmp_path, capsys):
    trainer = make(save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "differential-privacy" in card and "SFT" not in card
    assert (tmp_path / "out" / "checkpoint-2" / "README.md").exists()


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_what_joins_rows_is_refused(make, name):
    with pytest.raises(ValueError, match=rf"^{name}=True: "):
        make(**{name: True})


def test_autocast_is_refused(make):
    with pytest.raises(ValueError, match=r"^bf16=True: "):
        make(bf16=True)
