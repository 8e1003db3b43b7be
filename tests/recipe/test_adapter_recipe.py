"""The recipe adapter.yaml plans, and trains a tiny model in two steps with what it keeps of rows."""

import pytest

from hf_dpzo.cli.main import main
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.trainer import checking

from support.paths import ROOT
from support.recipes import table


RECIPE = ROOT / "recipes" / "adapter.yaml"
TINY = ["--template={text} :", '--label_words={"0": "bad", "1": "good"}', "--lora_r=2", "--expected_batch_size=8"]
TINY += ["--max_steps=2", "--padded_lengths=8", "--max_length=8", "--per_device_train_batch_size=4", "--use_cpu=true"]


@pytest.fixture
def arguments(workplace):
    """The recipe on a tiny model and rows of two words."""
    named = {"model_name_or_path": "causal", "data": "rows.csv", "output_dir": "out"}
    paths = [f"--{name}={workplace / value}" for name, value in named.items()]
    without = "--without=gguf_file,where,lora_layers,calibrate_on"
    return [str(RECIPE), *paths, *TINY, "--eval_rows=10", "--disable_tqdm=true", without]


def test_it_trains_from_what_is_kept_of_rows(arguments, capsys, monkeypatch):
    shared = []
    find = checking.find_shared_work
    monkeypatch.setattr(
        checking, "find_shared_work", lambda *given, **more: shared.append(find(*given, **more)) or shared[0]
    )
    assert main(["train", *arguments]) == 0
    shown = table(capsys.readouterr().out)
    assert float(shown["epsilon"]) <= 2 and shown["steps"] == "2"
    assert shared[0].is_split and shared[0].rows.store is not None and shared[0].points_per_pass > 1


def test_it_is_private_and_another_data_set_is_a_matter_of_two_paths():
    recipe, args = read_recipe(RECIPE, ["--data=a.jsonl", "--eval_data=b.jsonl", "--without=where,eval_rows"])
    assert (recipe.data, recipe.eval_data, recipe.where, recipe.eval_rows) == ("a.jsonl", "b.jsonl", None, None)
    assert args.private and args.target_epsilon == 2 and args.frozen_cache == "memory"


def test_it_trains_without_privacy_for_comparison():
    without = "target_epsilon,target_delta,clip_norm,num_directions"
    _, args = read_recipe(RECIPE, ["--method=mezo", f"--without={without}"])
    assert not args.private
