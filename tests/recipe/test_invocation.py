"""Activated adapters in recipes: the text, or the assistant's turn, that activates them, as tokens within a row."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_dpzo.cli.main import main
from hf_dpzo.models.activation import locate_invocation
from hf_dpzo.recipe.invocation import find_ending, find_invocation_tokens

from support.data_recipes import data_recipe, encode_first_row, letter_tokenizer, spell, spell_learned


ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}$\n{% endfor %}"
THOUGHT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>"
    "{% generation %}{{ m.content }}${% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><no thought>{% endif %}"
)
ALORA = {"adapter": "activated-lora"}


@pytest.fixture(scope="module")
def pairs_tokenizer():
    """Joins characters to longer tokens, also over the borders of words: a mark or a d with the space behind it."""
    joined = [(".", "\u0120"), ("d", "\u0120"), ("w", "a"), ("wa", "s")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<pad>", *letters, *map("".join, joined)])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=joined))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def find(tokenizer, **changes):
    return find_invocation_tokens(data_recipe("rows.csv", **{**ALORA, **changes}), tokenizer)


def test_the_end_of_the_template_activates_it():
    assert spell(find(letter_tokenizer(begins=True, ends=True), template="{title} {text} It was")) == " It was"


@pytest.mark.parametrize("changes", [{"label_words": None, "task": "causal-lm", "response": " {answer}"}, {}])
def test_a_named_text_of_the_template_activates_it(changes):
    changes = {"template": "Review: {text} It was", "lora_invocation": "It", **changes}
    assert spell(find(letter_tokenizer(), **changes)) == "It"


ENDINGS = {
    "the end of the template": ({"template": "{title} {text} It was"}, " It was"),
    "a part of that": ({"template": "{text} It was", "lora_invocation": "It"}, " It was"),
    "a text before the last column": ({"template": "Review: {text} It was", "lora_invocation": "Review"}, ""),
    "a prompt before an answer": ({"label_words": None, "task": "causal-lm", "response": " {answer}"}, ""),
    "a turn of a chat": ({"task": "chat", "label_words": None}, ""),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_an_ending_is_what_all_rows_end_with_if_it_activates_the_adapter(case):
    changes, expected = ENDINGS[case]
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = TURNS + ASK
    recipe = data_recipe("rows.csv", **{"template": "{text} It was", **ALORA, **changes})
    assert spell(find_ending(recipe, tokenizer)) == expected


@pytest.mark.parametrize("end", ["w", "d", ".", "12", '"', "é", " "])
def test_each_row_holds_the_tokens_whatever_its_text_ends_with(pairs_tokenizer, end):
    tokens = find(pairs_tokenizer, template="{text} It was")
    alone = pairs_tokenizer(" It was")["input_ids"]
    recipe = data_recipe("rows.csv", template="{text} It was", **ALORA)
    row = recipe.kind.encode({"text": f"a word{end}", "label": 0}, recipe, pairs_tokenizer)["input_ids"]
    assert locate_invocation(torch.tensor([row]), tokens) == len(row) - len(tokens)
    assert pairs_tokenizer.decode(tokens) == "It was"
    assert tokens != alone  # These have a space, which some rows join to what is before it.


def test_a_mark_that_the_template_holds_twice_activates_it():
    """Though some rows have more spaces in a row than the mark has letters."""
    changes = {"template": "Review: {text}  \nSentiment:", "lora_invocation": ":"}
    assert spell(find(letter_tokenizer(), **changes)) == ":"


@pytest.mark.parametrize("template", [TURNS + ASK, THOUGHT])
def test_the_last_turn_of_the_assistant_activates_it(template, tmp_path):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    tokens = find(tokenizer, task="chat", label_words=None)
    assert spell(tokens) == "<assistant>"
    talk = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    row = encode_first_row(tmp_path, {"messages": talk}, tokenizer, **ALORA, task="chat", label_words=None)
    place = int(locate_invocation(torch.tensor([row["input_ids"]]), tokens))
    learned = [number for number, label in enumerate(row["labels"]) if label != -100]
    assert learned[0] == place + len(tokens)  # Earlier turns are those of the base, from which nothing is learned.
    ordinary = encode_first_row(tmp_path, {"messages": talk}, tokenizer, task="chat", label_words=None)
    assert ordinary["input_ids"] == row["input_ids"] and spell_learned(ordinary).count("a") == 2


def test_a_chat_template_without_a_generation_prompt_is_refused():
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="the chat template has no generation prompt"):
        find(tokenizer, task="chat", label_words=None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"template": "It was {text}"}, "no text stands after its last column"),
        ({"template": "{text} It was", "lora_invocation": "It is"}, "the template does not hold it"),
        ({"template": "{text} It was", "adapter": "lora", "lora_invocation": "It"}, "adapter=lora is always active"),
        ({"template": "{text} It was {mask}."}, "task=prompt-classification trains another one here"),
        ({"task": "sequence-classification", "label_words": None, "classes": ["a", "b"]}, "trains another one here"),
        ({"task": "chat", "label_words": None, "lora_invocation": "It"}, "the beginning of the assistant's turn"),
    ],
)
def test_recipes_without_an_invocation_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        find(letter_tokenizer(), **changes)


def test_a_text_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(ValueError, match="lora_invocation='\u4e2d': this tokenizer writes it by other tokens"):
        find(letter_tokenizer(), template="{text}\u4e2d")


def test_a_recipe_trains_an_activated_adapter_whose_folder_verifies(write, workplace, capsys):
    path = write(**ALORA, eval_data_is_public=True)
    assert main(["train", path]) == 0
    config = json.loads((workplace / "out" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [47]  # The colon of "{text} :".
    capsys.readouterr()
    assert main(["verify", str(workplace / "out"), "--base", str(workplace / "causal")]) == 0
