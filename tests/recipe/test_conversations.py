"""Conversations that are not what a chat template expects: one sentence without their text, or one rule."""

import json

import datasets
import pytest

from hf_dpzo.recipe.loading import load_rows
from hf_dpzo.recipe.tasks.conversations import encode_conversation

from support.data_recipes import data_recipe, letter_tokenizer, spell


ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}${% endfor %}" + ASK
# Takes texts and parts, parts alone, or texts alone, of which it would write anything else as Python does.
PARTS = "{% for part in m.content %}{{ part.text }}{% endfor %}"
EITHER = PLAIN.replace(
    "{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def load(tmp_path, conversations, template, kind="jsonl", **changes):
    path = tmp_path / f"{len(conversations)}.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list([{"messages": messages} for messages in conversations]).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return load_rows(data_recipe(path, task="chat", label_words=None, **changes), tokenizer)[0]


REFUSALS = {
    "{{ raise_exception('Only two roles!') }}": "refuses a conversation (Only two roles!); change its messages",
    "{{ raise_exception('Bad role ' + messages[0].role) }}": "refuses a conversation (TemplateError); change",
    "{{ messages[0].content.secret.secret }}": "refuses a conversation (UndefinedError); change",
    "{{ messages[0].content + 1 }}": "refuses a conversation (TypeError); change",
}


@pytest.mark.parametrize(("refusal", "expected"), REFUSALS.items(), ids=["says", "shows", "undefined", "type"])
def test_a_conversation_that_the_template_refuses_gets_one_sentence_without_its_text(tmp_path, refusal, expected):
    template = "{% if messages[0].role == 'secret' %}" + refusal + "{% endif %}" + PLAIN
    with pytest.raises(ValueError) as caught:
        load(tmp_path, [TALK, [{"role": "secret", "content": "secret"}]], template)
    assert expected in str(caught.value) and "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for m in messages %}", "{{ messages | none }}"]
)
def test_a_template_that_writes_nothing_gets_one_sentence_before_rows_are_read(tmp_path, template):
    with pytest.raises(ValueError, match="task=chat: the chat template refuses a conversation"):
        load(tmp_path, [TALK], template)


def test_a_row_at_which_a_library_fails_gets_one_sentence_without_its_text(tmp_path, monkeypatch):
    recipe = data_recipe("rows.csv")

    def fail(self, row, recipe, tokenizer):
        raise OverflowError(row["text"])

    monkeypatch.setattr(type(recipe.kind), "encode", fail)
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nsecret,1\n")
    with pytest.raises(ValueError, match=r"a row can not become tokens \(OverflowError\); check the values in text"):
        load_rows(data_recipe(path), letter_tokenizer())


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("template", [PLAIN, EITHER, PLAIN.replace("{{ m.content }}", PARTS)])
@pytest.mark.parametrize("asked", [["hi"], ["h", "i"], "hi"])
def test_parts_of_text_are_written_as_the_template_takes_them(tmp_path, kind, template, asked):
    content = asked if asked == "hi" else [{"type": "text", "text": text} for text in asked]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    assert spell(load(tmp_path, [talk], template, kind)[0]["input_ids"]) == "<user>hi$<assistant>hi$"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "image", "url": "secret"}], "column=messages: a message has a part of type image"),
        ([{"type": "secret", "text": "a"}], "column=messages: a message has a part of another type than text"),
        ([{"type": "text", "text": 5}], "column=messages: a message has a part of another type"),
        ([5], "column=messages: a message has a part of another type"),
        ({"text": "secret"}, "column=messages: the content of a message is a dictionary"),
    ],
)
def test_contents_that_are_no_text_are_refused_by_column_and_type(tmp_path, content, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        load(tmp_path, [[{"role": "user", "content": content}, TALK[1]]], PLAIN)
    assert "secret" not in str(caught.value)


def test_numbers_and_truth_are_written_by_the_rule_for_cells(tmp_path):
    talk = [{"role": "user", "content": True}, {"role": "assistant", "content": 4.0}]
    assert spell(load(tmp_path, [talk], PLAIN)[0]["input_ids"]) == "<user>true$<assistant>4$"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nested_fields_of_one_row_change_no_other(tmp_path, kind):
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")

    def call(arguments):
        return [TALK[0], {**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    rows = [call({"x": 1}), call({"x": 1, "y": {"z": 2}})]
    few, more = (load(tmp_path, rows[:count], template, kind, max_length=500) for count in (1, 2))
    assert few[0]["input_ids"] == more[0]["input_ids"] and "null" not in spell(more[0]["input_ids"])


def test_the_forms_of_contents_are_found_anew_for_another_template():
    tokenizer = letter_tokenizer()
    for template in (PLAIN, PLAIN.replace("{{ m.content }}", PARTS)):
        tokenizer.chat_template = template
        assert spell(encode_conversation(TALK, tokenizer, max_length=50)["input_ids"]) == "<user>hi$<assistant>yo$"


@pytest.mark.parametrize(
    ("asked", "answer", "length", "expected"),
    [
        (50, 3, 60, "<user>" + "q" * 38 + "$<assistant>aaa$"),
        (50, 50, 60, "<user>" + "q" * 12 + "$<assistant>" + "a" * 30),
        (5, 50, 60, "<user>qqqqq$<assistant>" + "a" * 37),
        (5, 5, 10, "<user>$<as"),
    ],
)
def test_a_long_question_leaves_half_of_the_row_to_the_answer(asked, answer, length, expected):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = PLAIN
    talk = [{"role": "user", "content": "q" * asked}, {"role": "assistant", "content": "a" * answer}]
    row = encode_conversation(talk, tokenizer, max_length=length)
    assert spell(row["input_ids"]) == expected
