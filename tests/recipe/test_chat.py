"""Conversations: the turns of the assistant are learned, as the chat template of the tokenizer writes them."""

import json

import datasets
import pytest

from hf_dpzo.recipe.loading import load_rows
from hf_dpzo.recipe.tasks.conversations import encode_conversation

from support.data_recipes import data_recipe, encode_first_row, letter_tokenizer, spell, spell_learned


ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}$\n{% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>"
    "{% generation %}{{ m.content }}${% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
# Leaves out what the assistant said before the last turn.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}${% endfor %}"
    + ASK
)
TALK = [
    {"role": "system", "content": "s"},
    *({"role": role, "content": f"{role[0]}{turn}"} for turn in range(2) for role in ("user", "assistant")),
]


def chat_tokenizer(template):
    tokenizer = letter_tokenizer(begins=True, ends=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("template", "expected"), [(PLAIN, "a0$\na1$\n"), (MARKED, "a0$a1$"), (FORGETFUL, "a1$")])
def test_the_turns_of_the_assistant_are_learned(tmp_path, template, expected):
    changes = {"task": "chat", "label_words": None, "max_length": 500}
    row = encode_first_row(tmp_path, {"messages": TALK}, chat_tokenizer(template), **changes)
    assert spell_learned(row).replace("\x00", "\n") == expected
    assert 1 not in row["input_ids"]  # The template writes BOS where a model needs it.


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


@pytest.mark.parametrize(
    "nothing", [None, "", [], [{"type": "text", "text": ""}]], ids=["null", "empty", "list", "part"]
)
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_an_answer_that_says_nothing_is_not_learned_and_neither_is_what_was_asked(tmp_path, template, nothing):
    """A model that learns empty answers learns to say nothing."""
    talk = [TALK[0], turn("user", "q"), turn("user", "r"), turn("assistant", nothing), *TALK[1:3], turn("user", "x")]
    changes = {"task": "chat", "label_words": None, "max_length": 500}
    answered = {"messages": [*TALK[:3], turn("user", "x")]}
    row = encode_first_row(tmp_path, {"messages": talk}, chat_tokenizer(template), **changes)
    assert row == encode_first_row(tmp_path, answered, chat_tokenizer(template), **changes)
    with pytest.raises(ValueError, match="no conversation has a turn of the assistant that says anything"):
        encode_first_row(tmp_path, {"messages": talk[:4]}, chat_tokenizer(template), **changes)


def test_a_call_of_a_tool_is_an_answer_without_content():
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | default('') }}")
    talk = [turn("user", "q"), turn("assistant", "", tool_calls=["f"]), turn("tool", "4"), turn("assistant", "four")]
    row = encode_conversation(talk, chat_tokenizer(template), max_length=500)
    assert spell_learned(row).replace("\x00", "\n") == "['f']$\nfour$\n"
    unanswered = [*talk[:3], turn("assistant", ""), turn("user", "r"), turn("assistant", "s")]
    row = encode_conversation(unanswered, chat_tokenizer(template), max_length=500)
    assert spell(row["input_ids"]).startswith("<user>r")
    twice = [turn("user", "q"), turn("assistant", "a"), turn("assistant", "")]
    row = encode_conversation(twice, chat_tokenizer(PLAIN), max_length=500)
    assert spell_learned(row).replace("\x00", "\n") == "a$\n"


def test_long_conversations_lose_their_first_turns():
    row = encode_conversation(TALK, chat_tokenizer(MARKED), max_length=40)
    assert spell(row["input_ids"]) == "<system>s<user>u1<assistant>a1$" and spell_learned(row) == "a1$"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_conversation_decides_nothing_about_another(tmp_path, kind):
    """Arrow would give each message the fields that any message of any row has."""
    template = "{% for m in messages %}{{ m | length }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    path = tmp_path / f"rows.{kind}"
    other = [{"role": "user", "content": "x", "name": "n"}]
    rows = datasets.Dataset.from_list([{"messages": TALK}, {"messages": other}])
    if kind == "parquet":
        rows.to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (TALK, other)))
    changes = {"task": "chat", "label_words": None}
    first = load_rows(data_recipe(path, **changes), chat_tokenizer(template))[0][0]
    assert spell(first["input_ids"]).startswith("2s2u0")


def test_tokenizers_that_can_not_chat_get_one_sentence(tmp_path):
    changes = {"task": "chat", "label_words": None}
    with pytest.raises(ValueError, match="task=chat: this tokenizer has no chat template"):
        encode_first_row(tmp_path, {"messages": TALK}, **changes)
    with pytest.raises(ValueError, match="does not show where the assistant's turns begin"):
        encode_first_row(tmp_path, {"messages": TALK}, chat_tokenizer("{{ messages | length }}"), **changes)
    with pytest.raises(ValueError, match="column=messages: it holds no list of messages"):
        encode_first_row(tmp_path, {"messages": "hello"}, chat_tokenizer(PLAIN), **changes)
