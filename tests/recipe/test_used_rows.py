"""Which rows are used: not those without text or of which nothing is learned, and others decide nothing about it."""

import json

import datasets
import pytest

from hf_dpzo.recipe.loading import load_rows
from hf_dpzo.recipe.tables import load_tables

from support.data_recipes import data_recipe, letter_tokenizer, spell


def load(path, tokenizer=None, **changes):
    return load_rows(data_recipe(path, **changes), tokenizer or letter_tokenizer())[0]


def write(tmp_path, kind, rows):
    path = tmp_path / f"rows{len(rows)}.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "disk"])
def test_empty_texts_are_missing_cells(tmp_path, kind):
    path = write(tmp_path, kind, [{"text": "a", "label": "0"}, {"text": "", "label": "1"}, {"text": "b", "label": ""}])
    assert [spell(row["input_ids"]) for row in load(path)] == ["a"]
    with pytest.raises(ValueError, match="if_missing=refuse: a cell is missing"):
        load(path, if_missing="refuse")


CHAT = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% generation %}{{ m.content if m.role == 'assistant' }}{% endgeneration %}{% endfor %}"
)


def test_conversations_of_which_nothing_is_learned_are_left_out(tmp_path):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT
    short = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    silent, long = short[:1], [{"role": "system", "content": ""}] * 9 + short
    path = write(tmp_path, "jsonl", [{"messages": messages} for messages in (short, silent, [], long)])
    changes = {"task": "chat", "label_words": None, "max_length": 20}
    assert [spell(row["input_ids"]) for row in load(path, tokenizer, **changes)] == ["<user><assistant>yo"]
    path = write(tmp_path, "jsonl", [{"messages": long}])
    with pytest.raises(ValueError, match="with max_length=20 no row has a token that is learned; raise it"):
        load(path, tokenizer, **changes)


@pytest.mark.parametrize("other", ["user", "bot"])
def test_conversations_without_an_assistant_are_told_from_long_ones(tmp_path, other):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT
    talk = [{"role": "user", "content": "hi"}, {"role": other, "content": "a"}]
    path = write(tmp_path, "jsonl", [{"messages": talk}])
    with pytest.raises(ValueError, match=r"no conversation has a turn of the assistant .* the role assistant, or gpt"):
        load(path, tokenizer, task="chat", label_words=None)


def test_words_without_a_class_that_is_learned_are_left_out(tmp_path):
    path = write(tmp_path, "jsonl", [{"tokens": ["ab"], "label": ["0"]}, {"tokens": [], "label": []}])
    rows = load(path, task="token-classification", label_words=None, classes=["0", "1"])
    assert [spell(row["input_ids"]) for row in rows] == ["ab"]


def test_a_condition_that_no_row_meets_gets_one_sentence(tmp_path):
    path = write(tmp_path, "jsonl", [{"text": "a", "label": 0, "language": "en"}])
    with pytest.raises(ValueError, match=r"where=.*de.*: no row has these values; write them as the data do"):
        load(path, where={"language": "de"})


@pytest.mark.parametrize("asked", [{"eval_rows": 20}, {"eval_share": 0.2}])
def test_columns_that_are_not_used_move_no_row(tmp_path, asked):
    """pandas writes the number of each row as a column, so that one row more changes it in all rows after it."""
    found = []
    for first in (0, 1):
        folder = tmp_path / str(first)
        folder.mkdir()
        rows = [{"text": f"row {row}", "label": 0, "__index_level_0__": row - first} for row in range(first, 100)]
        train, held = load_tables(data_recipe(write(folder, "parquet", rows), **asked))
        found.append(({*train["text"]}, {*held["text"]}))
    (train, held), (fewer, fewer_held) = found
    assert len(train ^ fewer) == 1 and len(held - fewer_held) <= 1


def test_a_mask_that_a_text_holds_is_none(tmp_path):
    path = write(tmp_path, "jsonl", [{"text": "a[MASK]b", "label": 0}])
    assert spell(load(path, template="{text} {mask}")[0]["input_ids"]) == "a b *"


WORDS = {"task": "token-classification", "label_words": None, "classes": ["0", "1"]}
ASK = {"task": "question-answering", "label_words": None}


@pytest.mark.parametrize(("changes", "least"), [(WORDS, 3), (ASK, 2)])
def test_rows_without_room_are_refused_before_they_are_read(changes, least):
    tokenizer = letter_tokenizer(begins=True, ends=True)
    with pytest.raises(ValueError, match=f"max_length={least - 1}: it leaves no room for a text; set {least} at least"):
        load("rows.csv", tokenizer, **changes, max_length=least - 1)


def test_long_rows_of_words_lose_their_end(tmp_path):
    path = write(tmp_path, "jsonl", [{"tokens": ["ab", "cd"], "label": ["0", "1"]}])
    assert spell(load(path, **WORDS, max_length=1)[0]["input_ids"]) == "a"


@pytest.mark.parametrize(("length", "expected"), [(50, "q" * 9 + "so"), (11, "q" * 9 + "so"), (8, "qqqqso"), (2, "qs")])
def test_long_questions_leave_half_of_the_row(tmp_path, length, expected):
    row = {"question": "q" * 9, "context": "so", "answers": {"text": ["s"], "answer_start": [0]}}
    found = load(write(tmp_path, "jsonl", [row]), **ASK, max_length=length)[0]
    assert spell(found["input_ids"]) == expected and found["start_positions"] == found["end_positions"]
    assert spell(found["input_ids"][found["start_positions"] :])[0] == "s"


@pytest.mark.parametrize("start", [-1, 0, 1e308, 1.5, None, "two", True, 99])
def test_answers_that_are_not_where_they_are_said_to_be_are_refused(tmp_path, start):
    row = {"question": "why", "context": "a secret", "answers": {"text": ["secret"], "answer_start": [start]}}
    with pytest.raises(ValueError, match="column=answers: a row has an answer that does not begin at its") as caught:
        load(write(tmp_path, "jsonl", [row]), **ASK)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, {"text": None, "answer_start": None}])
@pytest.mark.parametrize("start", ["2", 2.0])
def test_rows_without_an_answer_and_numbers_of_other_types_are_read(tmp_path, answers, start):
    rows = [{"question": "q", "context": "a secret", "answers": answers}]
    rows += [{**rows[0], "answers": {"text": "secret", "answer_start": start}}]
    found = load(write(tmp_path, "jsonl", rows), **ASK)
    assert (found[0]["start_positions"], found[1]["start_positions"]) == (0, 3)


def test_an_empty_separator_of_labels_is_refused():
    with pytest.raises(ValueError, match="label_separator='': it is no text"):
        data_recipe("rows.csv", task="several-labels", label_words=None, classes=["a", "b"], label_separator="")


def test_rows_without_tokens_decide_no_type(tmp_path):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write(tmp_path, "jsonl", [{"messages": []}] * 1001 + [{"messages": talk}])
    assert len(load(path, tokenizer, task="chat", label_words=None)) == 1


@pytest.mark.parametrize(("kind", "content"), [("jsonl", ""), ("json", "[]"), ("csv", "text,label\n"), ("txt", "")])
def test_files_without_a_row_get_one_sentence(tmp_path, kind, content):
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)
    with pytest.raises(ValueError, match="it holds no row; name a file of rows"):
        load(path)
