"""Recipes that train on generated text, and adapters of which half is trained."""

import pytest
from peft import get_peft_model_state_dict

from hf_dpzo.losses.objective import TextObjective
from hf_dpzo.recipe.loading import add_adapter

from support.data_recipes import data_recipe, encode_first_row, letter_tokenizer, spell
from support.models import causal_lm, word_tokenizer


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
