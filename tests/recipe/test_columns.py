"""A column that the data do not have: the sentence says what a recipe writes to read another one."""

import re

import pytest
import yaml

from hf_dpzo.recipe.columns import explain_missing_column
from hf_dpzo.recipe.recipe import parse_recipe

from support.data_recipes import data_recipe


CHAT = {"task": "chat", "label_words": None}


def explain(name, *present, data="rows.jsonl", **changes):
    return explain_missing_column(name, present, data_recipe(data, **changes))


@pytest.mark.parametrize(
    ("name", "present", "changes", "remedy"),
    [
        ("messages", ["id", "conversations"], CHAT, "set columns: {messages: conversations} to read that."),
        ("messages", ["talk"], CHAT, "set columns: {messages: THEIRS} with the name of theirs."),
        ("talks", ["chat"], {**CHAT, "columns": {"messages": "talks"}}, "set columns: {messages: chat} to read that."),
        (
            "talks",
            ["messages", "chat"],
            {**CHAT, "columns": {"messages": "talks"}},
            "leave messages out of columns to read messages.",
        ),
        (
            "messages",
            ["prompt", "completion"],
            CHAT,
            "set task: causal-lm, template: '{prompt}' and response: '{completion}' to learn the second.",
        ),
        ("question", ["query", "x"], {**CHAT, "task": "question-answering"}, "set columns: {question: query} to read"),
        ("text", ["note", "label"], {}, "write one of these in template='{text}'."),
        ("label", ["text", "class"], {}, "name one of these as label_column."),
    ],
)
def test_the_field_that_names_a_column_is_named(name, present, changes, remedy):
    said = explain(name, *present, **changes)
    assert re.match(rf"[a-z_]+=.+: the data have no column {name}, only ", said)
    assert remedy in said and "separator" not in said


def test_a_remedy_can_be_typed():
    written = re.search(r"set (.+) to read that", explain("messages", "conversations", **CHAT))[1]
    recipe, _ = parse_recipe(
        {"model_name_or_path": "m", "data": "d", "output_dir": "o", "method": "mezo", **CHAT, **yaml.safe_load(written)}
    )
    assert recipe.used_columns == ["conversations"]


@pytest.mark.parametrize(
    ("data", "is_said"), [("a.csv", True), ("a.tsv.gz", True), ("a.jsonl", False), ("a.parquet", False)]
)
def test_only_files_that_have_a_separator_are_told_of_it(data, is_said):
    assert ("separator" in explain("text", "text;label", data=data)) == is_said
    assert "separator" not in explain("text", "note", "label", data=data)
