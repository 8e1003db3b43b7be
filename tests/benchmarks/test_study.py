"""The study's plan can be run, and its shortcut computes what the whole model computes."""

import csv
import statistics
import sys

import pytest
import torch
import yaml

from hf_dpzo.losses.per_example import ForwardPass
from hf_dpzo.recipe.recipe import parse_recipe

from support.models import causal_lm
from support.paths import MEASUREMENTS


FOLDER = MEASUREMENTS / "study"
PLAN = yaml.safe_load((FOLDER / "study.yaml").read_text(encoding="utf-8"))
CONTENDERS = {name: one for name, one in (PLAN["contenders"] | PLAN["baselines"]).items() if name != "dp-adamw"}


@pytest.fixture(scope="module")
def prefix():
    sys.path.insert(0, str(FOLDER))
    import frozen_prefix

    yield frozen_prefix
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_is_a_valid_recipe(name):
    recipe = yaml.safe_load((FOLDER / PLAN["recipe"]).read_text(encoding="utf-8"))
    changes = {"target_epsilon": 2, "max_steps": 80, **CONTENDERS[name]}
    if name in PLAN["baselines"]:
        changes |= dict.fromkeys(("target_epsilon", "target_delta", "clip_norm"))
    _, args = parse_recipe({**recipe, **changes})
    assert args.private == (name in PLAN["contenders"])


def test_every_private_method_is_a_contender():
    from hf_dpzo.methods import METHODS, PrivateMethod

    private = {name for name, method in METHODS.items() if issubclass(method, PrivateMethod)}
    assert private <= {settings["method"] for settings in CONTENDERS.values()}


@torch.no_grad()
def test_the_rest_of_the_model_on_cached_layers_agrees_with_the_whole_model(prefix, tokenizer):
    model = causal_lm(num_hidden_layers=4)
    rows = [{"input_ids": [5, 6, 7], "labels": 0}, {"input_ids": [8, 9, 10, 11, 12], "labels": 1}]
    cached = prefix.outputs_of_layers(model, rows, 3)
    rest = prefix.without_layers(model, 3)
    assert len(rest.model.layers) == 1
    inputs = prefix.collate(cached, tokenizer)
    logits = ForwardPass(rest)(rest, inputs)[:, -1]
    for number, row in enumerate(rows):
        torch.testing.assert_close(logits[number], model(torch.tensor([row["input_ids"]])).logits[0, -1])
    assert len(model.model.layers) == 4


def test_the_recorded_table_matches_the_recorded_runs():
    with (FOLDER / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for name in PLAN["contenders"]:
        cells = []
        for epsilon in PLAN["epsilons"]:
            runs = [row for row in rows if row["contender"] == name and float(row["epsilon"] or 0) == epsilon]
            assert sorted(int(row["seed"]) for row in runs) == PLAN["seeds"]
            assert all(float(row["pure_epsilon"] or row["stated_epsilon"]) <= epsilon for row in runs)
            values = sorted(float(row["accuracy"]) for row in runs)
            cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        assert f"| {name} | {' | '.join(cells)} |" in text
