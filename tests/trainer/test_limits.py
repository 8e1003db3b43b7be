"""What is said before training of the run's limits, by public rows alone."""

import logging

import pytest
import torch
from peft import LoraConfig, TaskType

from hf_dpzo import ZOTrainer, seeded_peft_model
from hf_dpzo.methods import AggZO, DPZero
from hf_dpzo.privacy.limits import RunLimits
from hf_dpzo.trainer import limits
from hf_dpzo.zo.directions import Rademacher

from support.models import one_layer
from support.rows import few_public_rows, labelled_rows


def lora() -> LoraConfig:
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"])


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
    train(labelled_rows(16), model=seeded_peft_model(one_layer(), lora(), seed=0, freeze_a=freeze_a))
    assert any("both matrices of LoRA are trained" in text for _, text in told) != freeze_a


@pytest.mark.parametrize("scales", [None, {"score": 0.01}], ids=["one", "several"])
def test_a_head_that_drowns_its_adapter_is_told_with_a_scale(train, told, scales):
    base = one_layer()
    with torch.no_grad():  # The output is of the size of the final norm's gains, and so is a head's coefficient.
        base.model.norm.weight.fill_(300.0)
        base.score.weight.div_(300.0)
    train(labelled_rows(16), model=seeded_peft_model(base, lora(), seed=0, freeze_a=True), perturbation_scales=scales)
    texts = [text for _, text in told if text.startswith("perturbation_scales")]
    assert bool(texts) == (scales is None)
    assert all('set perturbation_scales={"modules_to_save": ' in text for text in texts)


@pytest.mark.parametrize(("ratio", "warned"), [(9, False), (38, True)])
def test_a_head_of_the_size_of_its_adapter_drowns_nothing(told, ratio, warned):
    model = seeded_peft_model(one_layer(), lora(), seed=0, freeze_a=True)
    trained = dict(enumerate(p for p in model.parameters() if p.requires_grad))
    spreads = [1.0, float(ratio)]
    limits.warn_of_drowned_adapter(model, trained, lambda moved: spreads.pop(0))
    assert bool(told) == warned
    assert all('set perturbation_scales={"modules_to_save": 0.03} to even them' in text for _, text in told)


def test_the_hint_costs_two_central_differences():
    parameter = torch.zeros(4)
    seen = []
    found = limits.measure_quotients(
        {0: parameter},
        evaluate=lambda: seen.append(1) or parameter.sum() * torch.tensor([1.0, 2.0, torch.nan]),
        directions=Rademacher(seed=0, sizes=[4]),
        smoothing=0.5,
    )
    assert len(seen) == 2 * limits.SEEN_DIRECTIONS == 4
    expected = [float(Rademacher(seed=0, sizes=[4]).values(index=0, step=0, direction=k).sum()) for k in range(2)]
    assert found.tolist() == [expected, [2 * value for value in expected]]  # A row that fails has no part in it.
