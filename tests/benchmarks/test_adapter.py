"""The contenders of the adapter's measurement are valid recipes, and what DP-AdamW keeps of rows gives their losses."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import DataCollatorWithPadding

from hf_dpzo.losses.prompting import NextWordLoss
from hf_dpzo.recipe.recipe import read_recipe

from support.activated import activated_model, activated_rows
from support.models import word_tokenizer
from support.paths import MEASUREMENTS


@pytest.fixture(scope="module")
def load():
    """Import a part of the measurement by its name."""
    folder = str(MEASUREMENTS / "adapter")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


def test_contenders_are_valid_recipes(load):
    adapter = load("adapter")
    private = {}
    for contender in adapter.CONTENDERS:
        _, args = read_recipe(adapter.RECIPE, adapter.merge_without([*contender.flags]))
        private[contender.name] = args.private
    assert private == {"recipe": True, "mezo": False, "dp-adamw": True}


@torch.no_grad()
def test_rows_that_go_on_after_what_is_kept_have_the_losses_of_whole_rows(load):
    torch.manual_seed(0)
    model = activated_model().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    # Each ends with the invocation.
    rows = [{"input_ids": row["input_ids"][:-2], "labels": number % 2} for number, row in enumerate(activated_rows(5))]
    loss = NextWordLoss(words=[5, 6], model=model)
    trainer = SimpleNamespace(
        model=model, data_collator=DataCollatorWithPadding(word_tokenizer()), per_example_loss=loss
    )
    kept = load("prefixes").KeptPrefixes(trainer)
    whole = loss(model, trainer.data_collator(rows))
    for _ in range(2):  # The second time from what was kept.
        torch.testing.assert_close(kept.loss(model, kept(rows)), whole, rtol=1e-5, atol=1e-5)
    found = loss.scores(model, trainer.data_collator(rows)).argmax(dim=1).tolist()
    right = sum(one == row["labels"] for one, row in zip(found, rows, strict=True))
    assert kept.measure_accuracy(rows, batch_size=2) == right / len(rows)


def test_a_curve_counts_no_time_of_evaluation(load):
    curve = load("curve").Curve(lambda every_row: load("time").sleep(0.2) or 0.5, every=2, steps=3)
    for step in range(4):
        curve.measure(step)
    assert [point[1:] for point in curve.points] == [(0.5, None), (0.5, None), (0.5, 0.5)]
    assert curve.points[-1][0] < 0.2
