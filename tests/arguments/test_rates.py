"""The learning rate that is chosen where none is set suits what was tuned, and follows what it should."""

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.arguments.rates import EARLIER_DEFAULT, NOISELESS_RATE
from hf_dpzo.recipe.recipe import read_recipe

from support.models import one_layer
from support.paths import ROOT
from support.rows import labelled_rows
from support.runs import short_args


# What was tuned: recipes, with the number of training rows that they were tuned with.
TUNED = {"quickstart": 7930, "adapter": 7930, "full_parameters": 7930, "exact_match": 3000}
UNSET = {"learning_rate": "absent"}


@pytest.mark.parametrize("name", TUNED)
def test_the_chosen_rate_is_within_a_factor_of_four_of_what_was_tuned(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    _, tuned = read_recipe(path)
    _, args = read_recipe(path)
    args.learning_rate = None
    method, budget = args.plan(TUNED[name])
    args.settle_learning_rate(method, budget.planned_steps)
    assert abs(math.log(args.learning_rate / tuned.learning_rate)) < math.log(4.1)


def rate_of(folder, rows: int = 16, **changes) -> float:
    args = short_args(folder, **UNSET, **changes)
    trainer = ZOTrainer(model=one_layer(), args=args, train_dataset=labelled_rows(rows))
    assert trainer.optimizer_cls_and_kwargs[1]["lr"] == args.learning_rate
    return args.learning_rate


def test_it_follows_the_scale_of_the_loss_the_distance_and_the_length_of_the_run(tmp_path):
    rate = rate_of(tmp_path, clip_norm=1.0)
    assert rate_of(tmp_path, clip_norm=10.0) == pytest.approx(rate / 10, rel=0.01)
    assert rate_of(tmp_path, clip_norm=1.0, smoothing=1e-1) == pytest.approx(rate * 10, rel=0.01)
    assert rate_of(tmp_path, clip_norm=1.0, max_steps=16) == pytest.approx(rate / 2, rel=0.01)
    assert rate_of(tmp_path, clip_norm=1.0, update="momentum") == pytest.approx(rate / 10, rel=0.01)


def test_updates_of_a_size_of_their_own_have_a_rate_of_their_own(tmp_path):
    assert rate_of(tmp_path, method="aggzo", num_directions=4, update="normalized") == pytest.approx(1e-2 / 4)
    assert rate_of(tmp_path, method="aggzo", num_directions=4, update="adam") == pytest.approx(1e-2 / 2)


def test_without_noise_it_is_the_largest_one_that_the_pages_name_for_all_parameters(tmp_path):
    plain = {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"}
    assert rate_of(tmp_path, **plain) == NOISELESS_RATE
    assert "1e-7 to 1e-4 for all parameters" in (ROOT / "docs" / "migrating.md").read_text()


def test_arguments_that_two_trainers_share_have_the_rate_of_each(tmp_path):
    args = short_args(tmp_path, **UNSET, expected_batch_size="all")
    rates = []
    for rows in (16, 32):
        ZOTrainer(model=one_layer(), args=args, train_dataset=labelled_rows(rows))
        rates.append(args.learning_rate)
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.01)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_run_that_began_with_the_default_of_an_earlier_version_goes_on_with_it(tmp_path, warmup):
    def build(**changes) -> ZOTrainer:
        args = short_args(tmp_path, warmup_steps=warmup, max_steps=6, **changes)
        torch.manual_seed(0)
        return ZOTrainer(model=one_layer(), args=args, train_dataset=labelled_rows(16))

    first = build(learning_rate=EARLIER_DEFAULT)
    first.add_callback(StopAt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    build(**UNSET).train(resume_from_checkpoint=True)
    rates = [record.learning_rates[0] for record in Trajectory.read(tmp_path).records]
    assert len(rates) == 6 and max(rates) == EARLIER_DEFAULT
