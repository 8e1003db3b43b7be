"""What is said before training of the run's limits, by public rows alone."""

import logging

import pytest
import torch
from peft import LoraConfig, TaskType

from hf_dpzo import ZOTrainer, seeded_peft_model
from hf_dpzo.methods import AggZO, DPZero
from hf_dpzo.privacy.limits import RunLimits
from hf_dpzo.trainer import limits

from support.models import one_layer
from support.rows import few_public_rows, labelled_rows


@pytest.fixture
def told(monkeypatch):
    """What is logged, by its level."""
    lines = []
    for name in ("info", "warning"):
        monkeypatch.setattr(
            limits.logger, name, lambda text, name=name: lines.append((getattr(logging, name.upper()), text))
        )
    return lines


@pytest.fixture
def train(make_args):
    def run(rows, *, resume=False, model=None, evaluation=None, **changes):
        args = make_args(**{"expected_batch_size": 4, "max_steps": 1, **changes})
        torch.manual_seed(0)
        trainer = ZOTrainer(
            model=model or one_layer(),
            args=args,
            train_dataset=rows,
            eval_dataset=evaluation,
            probe_rows=None if evaluation else few_public_rows(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_a_run_of_few_rows_is_told_that_rows_limit_it_and_what_its_time_buys(train, told):
    rows = labelled_rows(400)
    train(rows, noise_multiplier=0.05, clip_norm=1e-2, smoothing=1e-2, max_steps=1)
    (level, text), *others = told
    assert level == logging.WARNING and not others
    assert "times the privacy noise, so rows or directions, not epsilon, limit this run; raise it" in text
    assert "% of 2 public rows would be clipped at the start" in text


def test_the_same_time_is_told_in_rows_and_in_directions():
    found = RunLimits(sampling=0.35, privacy=0.065, clipped=0.1, spread=1.0, coefficients=1200)
    plain = DPZero(noise_multiplier=0.52, expected_batch_size=8)
    text = limits.describe_noise(found, _Arguments(), plain, num_units=5000)
    assert "is 5.4 times the privacy noise" in text
    assert text.endswith("the same time buys 38 steps of 32, or 38 steps along 4 directions by method=aggzo.")
    several = AggZO(noise_multiplier=0.52, expected_batch_size=8, num_directions=4)
    assert text != limits.describe_noise(found, _Arguments(), several, num_units=5000)


class _Arguments:
    unit_name_plural = "rows"

    def resolve_batch_size(self, num_units: int) -> int:
        return 8


def test_nothing_of_private_rows_is_told(train, told):
    for seed in (0, 1):
        train(labelled_rows(40, seed=seed), clip_norm=1e-2)
    assert told[0] == told[1]


def test_made_up_rows_are_called_so_and_rows_of_a_public_evaluation_public(train, told):
    alone = {"per_device_eval_batch_size": 1}
    train(labelled_rows(40), evaluation=labelled_rows(12, seed=3), **alone)
    train(labelled_rows(40), evaluation=labelled_rows(12, seed=3), eval_data_is_public=True, **alone)
    assert "made-up rows would be clipped" in told[0][1] and "of 8 public rows would be clipped" in told[1][1]


def test_a_full_batch_has_no_noise_of_sampling(train, told):
    train(labelled_rows(16), expected_batch_size="all")
    assert "all rows are in each step, so that its noise is that of privacy alone" in told[0][1]


def test_a_wide_clip_norm_is_told_with_one_that_fits(train, told):
    train(labelled_rows(40), clip_norm=1e4)
    level, text = told[0]
    assert level == logging.WARNING
    assert "0% of 2 public rows would be clipped at the start; their spread is" in text and "add less noise" in text


def test_nothing_is_told_again_where_a_run_goes_on_and_nothing_where_there_is_no_noise(train, told, tmp_path):
    train(labelled_rows(16), output_dir=str(tmp_path / "run"))
    train(labelled_rows(16), output_dir=str(tmp_path / "run"), resume=True)
    assert len(told) == 1
    train(labelled_rows(16), method="mezo", noise_multiplier=None, target_delta=None)
    assert len(told) == 1


def test_rows_that_fail_stop_no_run(train, told, monkeypatch):
    monkeypatch.setattr(limits, "shifted", lambda *_: 1 / 0)
    train(labelled_rows(16))
    assert told == []


@pytest.mark.parametrize("freeze_a", [False, True])
def test_both_factors_of_lora_are_warned_of(train, told, freeze_a):
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"])
    train(labelled_rows(16), model=seeded_peft_model(one_layer(), config, seed=0, freeze_a=freeze_a))
    assert any("both matrices of LoRA are trained" in text for _, text in told) != freeze_a
