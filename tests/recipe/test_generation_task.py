"""Recipes that train on generated text, and adapters of which half is trained."""

import pytest
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from hf_dpzo.cli.main import main
from hf_dpzo.losses.objective import TextObjective
from hf_dpzo.recipe.loading import add_adapter

from support.data_recipes import data_recipe, encode_first_row, letter_tokenizer, spell
from support.models import causal_lm, word_tokenizer
from support.paths import ROOT
from support.recipes import table


RECIPE = ROOT / "recipes" / "exact_match.yaml"


GENERATION = {"task": "generation", "reward": "exact_match", "template": "Q: {text} A:", "max_new_tokens": 2}


def first_row(tmp_path, row, tokenizer=None, **changes):
    return encode_first_row(tmp_path, row, tokenizer, **{**GENERATION, **changes})


def test_the_prompt_is_encoded_and_the_word_of_the_class_is_to_be_met(tmp_path):
    row = first_row(tmp_path, {"text": "why", "label": 1})
    assert spell(row["input_ids"]) == "Q: why A:" and row["reference"] == " good"


def test_the_prompt_does_not_end_with_eos(tmp_path):
    tokenizer = letter_tokenizer(begins=True, ends=True)
    assert spell(first_row(tmp_path, {"text": "why", "label": 1}, tokenizer)["input_ids"]) == "^Q: why A:"


def test_a_response_is_to_be_met_where_there_is_one(tmp_path):
    row = first_row(tmp_path, {"text": "why", "answer": "so"}, label_words=None, response="{answer}")
    assert row["reference"] == "so"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"reward": "rouge"}, "reward=rouge: task generation needs one of accuracy"),
        ({"response": "{answer}"}, "set either response or label_words"),
        ({"label_words": None}, "set either response or label_words"),
    ],
)
def test_recipes_without_something_to_meet_are_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        data_recipe("rows.csv", **{**GENERATION, **changes})


def test_the_loss_is_a_metric_of_generated_text():
    recipe = data_recipe("rows.csv", **GENERATION)
    assert isinstance(recipe.kind.build_loss(recipe, causal_lm(), letter_tokenizer()), TextObjective)


def test_half_of_an_adapter_is_trained_and_all_of_it_is_saved():
    recipe = data_recipe("rows.csv", **GENERATION, lora_freeze_a=True, lora_target_modules=["q_proj"])
    model = add_adapter(causal_lm(), recipe, word_tokenizer(), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_B" in name for name in trained)
    assert any("lora_A" in name for name in get_peft_model_state_dict(model))


def test_the_shipped_recipe_trains_on_what_a_model_says(models, tmp_path, capsys):
    flags = {
        "model_name_or_path": models / "causal",
        "data": models / "rows.csv",
        "dtype": "float32",
        "template": "{text} w1 w2",
        "lora_invocation": "w2",
        "label_words": '{"0": "w3", "1": "w4"}',
        "lora_target_modules": "q_proj",
        "eval_rows": 8,
        "max_length": 8,
        "padded_lengths": 8,
        "expected_batch_size": 8,
        "per_device_train_batch_size": 4,
        "num_directions": 2,
        "max_steps": 2,
        "target_delta": 1e-3,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
    }
    spelled = [f"--{name}={value}" for name, value in flags.items()]
    assert main(["train", str(RECIPE), "--without=gguf_file,where,lora_layers", *spelled]) == 0
    shown = table(capsys.readouterr().out)
    assert shown["steps"] == "2" and float(shown["epsilon"]) <= 2 and "reward before" in shown
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
