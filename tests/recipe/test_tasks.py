"""What a row becomes for each task of a recipe."""

import copy
import json

import pytest
import transformers

from hf_dpzo.cli.main import main
from hf_dpzo.recipe.loading import load_model
from hf_dpzo.recipe.tasks import TASKS

from support.data_recipes import data_recipe, encode_first_row, letter_tokenizer, spell, spell_learned
from support.heads import CASES
from support.models import classifier, word_tokenizer
from support.recipes import table


RESPONSE = {"task": "causal-lm", "label_words": None, "template": "Q: {text} A:", "response": " {answer}"}


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_prompt_and_response_are_one_text(tmp_path, begins, ends):
    tokenizer = letter_tokenizer(begins=begins, ends=ends)
    row = encode_first_row(tmp_path, {"text": "why", "answer": "so"}, tokenizer, **RESPONSE)
    assert spell(row["input_ids"]) == ("^" if begins else "") + "Q: why A: so$"
    assert spell_learned(row) == " so$" and len(row["labels"]) == len(row["input_ids"]) == sum(row["attention_mask"])


def test_special_tokens_that_a_text_holds_are_not_repeated(tmp_path):
    tokenizer = letter_tokenizer(begins=True)
    changes = {**RESPONSE, "template": "<s>Q: {text} A:", "response": " {answer}</s>"}
    assert (
        spell(encode_first_row(tmp_path, {"text": "why", "answer": "so"}, tokenizer, **changes)["input_ids"])
        == "^Q: why A: so$"
    )


def test_a_token_that_reaches_over_the_border_is_cut_there(tmp_path):
    """The prompt has to be the one that is asked later, which ends there too."""
    changes = {**RESPONSE, "template": "w1 {text}", "response": "w3 {answer}"}
    tokenizer = word_tokenizer()
    row = encode_first_row(tmp_path, {"text": "w2", "answer": "good"}, tokenizer, **changes)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["w1", "w2", "w3", "good", "[EOS]"]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("q" * 5, "a" * 40, "[" + "q" * 5 + "]" + "a" * 24 + "$"),
        ("q" * 50, "a" * 3, "[" + "q" * 25 + "]" + "a" * 3 + "$"),
        ("q" * 50, "a" * 40, "[" + "q" * 13 + "]" + "a" * 15 + "$"),
    ],
)
def test_the_response_has_the_room_that_the_prompt_leaves(tmp_path, text, answer, expected):
    changes = {**RESPONSE, "template": "[{text}]", "response": "{answer}", "max_length": 32}
    assert spell(encode_first_row(tmp_path, {"text": text, "answer": answer}, **changes)["input_ids"]) == expected


def test_a_response_that_can_not_fit_is_refused_before_rows_are_read(tmp_path):
    with pytest.raises(ValueError, match="max_length=7: the template alone leaves no room for a response; set 8 at"):
        encode_first_row(tmp_path, {"text": "a", "answer": "b"}, **RESPONSE, max_length=7)
    with pytest.raises(ValueError, match="max_length=2: the template alone is longer"):
        encode_first_row(tmp_path, {"text": "a", "label": 0}, template="Q: {text}", max_length=3)


def test_prompts_for_label_words_do_not_end_with_eos(tmp_path):
    tokenizer = letter_tokenizer(begins=True, ends=True)
    row = {"text": "why", "label": 1}
    assert spell(encode_first_row(tmp_path, row, tokenizer)["input_ids"]) == "^why"
    assert spell(encode_first_row(tmp_path, row, tokenizer, template="{text} {mask}")["input_ids"]) == "^why *$"


@pytest.mark.parametrize("template", ['{{"review": "{text}"}}', "{text}{{}}"])
def test_braces_that_are_text_are_written_twice(tmp_path, template):
    found = spell(encode_first_row(tmp_path, {"text": "why", "label": 1}, template=template)["input_ids"])
    assert found == template.replace("{text}", "why").replace("{{", "{").replace("}}", "}")
    with pytest.raises(ValueError, match="a brace stands alone; write a brace that is text twice"):
        encode_first_row(tmp_path, {"text": "why", "label": 1}, template='{"review": "{text}"')


def test_columns_may_have_dots(tmp_path):
    assert spell(encode_first_row(tmp_path, {"a.b": "why", "label": 1}, template="{a.b}")["input_ids"]) == "why"


# ---- Heads ----

HEAD = {"task": "sequence-classification", "label_words": None}


def test_numbers_are_labels_of_regression(tmp_path):
    changes = {**HEAD, "task": "regression"}
    assert encode_first_row(tmp_path, {"text": "a", "label": "3.5"}, **changes)["labels"] == 3.5
    several = {**changes, "label_columns": ["x", "y"]}
    assert encode_first_row(tmp_path, {"text": "a", "x": 1, "y": -2.5}, **several)["labels"] == [1.0, -2.5]
    with pytest.raises(ValueError, match=r"label_column=label: a row holds a text there and no number; .*\.$"):
        encode_first_row(tmp_path, {"text": "a", "label": "many"}, **changes)


@pytest.mark.parametrize(("cell", "separator"), [(["c", "a"], None), ("c|a", "|"), ([2, 0], None)])
def test_a_row_may_have_several_labels(tmp_path, cell, separator):
    names = ["0", "1", "2"] if cell == [2, 0] else ["a", "b", "c"]
    changes = {**HEAD, "task": "several-labels", "classes": names, "label_separator": separator}
    assert encode_first_row(tmp_path, {"text": "a", "label": cell}, **changes)["labels"] == [1.0, 0.0, 1.0]
    columns = {**HEAD, "task": "several-labels", "label_columns": ["x", "y", "z"]}
    row = {"text": "a", "x": True, "y": "0", "z": None}
    assert encode_first_row(tmp_path, row, **columns)["labels"] == [1.0, 0.0, 0.0]


def test_the_first_token_of_a_word_has_its_class(tmp_path):
    changes = {"task": "token-classification", "label_words": None, "classes": ["O", "B"], "label_column": "tags"}
    row = encode_first_row(
        tmp_path, {"tokens": ["ab", "c"], "tags": ["B", "O"]}, letter_tokenizer(begins=True), **changes
    )
    assert (spell(row["input_ids"]), row["labels"]) == ("^abc", [-100, 1, -100, 0])
    with pytest.raises(ValueError, match="a row has another label in the column tags"):
        encode_first_row(tmp_path, {"tokens": ["ab", "c"], "tags": ["B", "X"]}, **changes)
    with pytest.raises(ValueError, match="column=tags: it holds no list"):
        encode_first_row(tmp_path, {"tokens": ["ab", "c"], "tags": "B O"}, **changes)


def test_answers_are_found_among_the_tokens(tmp_path):
    changes = {"task": "question-answering", "label_words": None, "max_length": 12}
    tokenizer = letter_tokenizer()
    row = {"question": "why?", "context": "since so", "answers": {"text": ["so"], "answer_start": [6]}}
    found = encode_first_row(tmp_path, row, tokenizer, **changes)
    assert spell(found["input_ids"][found["start_positions"] : found["end_positions"] + 1]) == "so"
    late = {**row, "context": "x" * 50 + "so", "answers": {"text": ["so"], "answer_start": [50]}}
    for other in (late, {**row, "answers": {"text": [], "answer_start": []}}):
        found = encode_first_row(tmp_path, other, tokenizer, **changes)
        assert (found["start_positions"], found["end_positions"]) == (0, 0)


@pytest.mark.parametrize("columns", [None, {"choices": ["A", "B"]}])
def test_each_choice_is_a_text(tmp_path, columns):
    changes = {"task": "multiple-choice", "label_words": None, "classes": ["A", "B"], "columns": columns}
    choices = {"choices": ["c", "dd"]} if columns is None else {"A": "c", "B": "dd"}
    row = encode_first_row(tmp_path, {"text": "q", "label": "B", **choices}, **changes)
    assert ([spell(choice) for choice in row["input_ids"]], row["labels"]) == (["qc", "qdd"], 1)
    with pytest.raises(ValueError, match="a row has not 3 choices" if columns is None else "a row has not 3"):
        encode_first_row(tmp_path, {"text": "q", "label": "B", **choices}, **{**changes, "classes": ["A", "B", "C"]})


def test_hidden_words_follow_from_the_row_alone(tmp_path):
    changes = {"task": "masked-lm", "label_words": None}
    row, again = (encode_first_row(tmp_path, {"text": "a" * 40, "n": n}, **changes) for n in range(2))
    assert row == again and spell(row["input_ids"]).count("*") == 6 and spell_learned(row) == "a" * 6


def test_sequences_have_responses_as_labels(tmp_path):
    changes = {**RESPONSE, "task": "seq2seq-lm", "response": "{answer}"}
    row = encode_first_row(tmp_path, {"text": "why", "answer": "so"}, letter_tokenizer(ends=True), **changes)
    assert (spell(row["input_ids"]), spell_learned(row)) == ("Q: why A:$", "so$")


def test_outputs_of_a_head_have_names(tmp_path):
    classifier(num_labels=3).save_pretrained(tmp_path / "model")
    names = {**HEAD, "model_name_or_path": str(tmp_path / "model"), "adapter": "none"}
    recipes = {
        ("pos", "neg"): {"label_words": {"1": " pos", "0": " neg"}},
        ("x", "y"): {"task": "several-labels", "label_columns": ["x", "y"]},
    }
    for expected, changes in recipes.items():
        recipe = data_recipe("rows.csv", **{**names, **changes})
        assert recipe.kind.model_options(recipe)["id2label"] == dict(enumerate(expected))
    recipe = data_recipe("rows.csv", **names, classes=["x", "y", "z"])
    model = load_model(recipe, word_tokenizer(), seed=0)
    model.save_pretrained(tmp_path / "saved")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").id2label == {0: "x", 1: "y", 2: "z"}


def test_outputs_that_have_names_are_not_renamed_by_the_order_of_a_recipe(tmp_path):
    names = {**HEAD, "model_name_or_path": str(tmp_path / "model"), "adapter": "none"}
    classifier(num_labels=2, id2label={0: "good", 1: "bad"}).save_pretrained(tmp_path / "model")
    for order, fields in {"bad, good": {"classes": ["bad", "good"]}, "Bad, Good": {"classes": ["Bad", "Good"]}}.items():
        with pytest.raises(ValueError, match=rf"^classes={order}: the head of .* in the order good, bad; name them so"):
            load_model(data_recipe("rows.csv", **names, **fields), word_tokenizer(), seed=0)
    model = load_model(data_recipe("rows.csv", **names, classes=["Good", "Bad"]), word_tokenizer(), seed=0)
    assert model.config.id2label == {0: "Good", 1: "Bad"}


def test_every_task_names_its_model_and_its_columns():
    recipes = {"classes": ["a", "b"], "label_words": None, "response": "{answer}", "reward": "exact_match"}
    for name, task in TASKS.items():
        changes = {"label_words": {"a": " a", "b": " b"}} if name == "prompt-classification" else {}
        recipe = data_recipe("rows.csv", task=name, **{**recipes, **changes})
        assert task.auto_class(recipe).__name__.startswith("AutoModel") and recipe.used_columns


TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


RUNS = {
    "chat": ("causal", {"messages": TALK}, {}),
    "regression": ("classifier", {"text": "w1 w2", "label": 3.5}, {}),
    "several-labels": ("classifier", {"text": "w1 w2", "label": ["a", "b"]}, {"classes": ["a", "b", "c"]}),
    "sequence-classification": ("classifier", {"text": "w1 w2", "label": "no"}, {"classes": ["no", "yes"]}),
}


# The architecture, a row, and the fields of its recipe.
HEADS = {
    "token-classification": (
        "BertForTokenClassification",
        {"tokens": ["w1", "w2"], "label": ["no", "yes"]},
        {"classes": ["no", "yes"]},
    ),
    "question-answering": (
        "BertForQuestionAnswering",
        {"question": "w1 w2", "context": "w3 w4 w5", "answers": {"text": ["w4"], "answer_start": [3]}},
        {},
    ),
    "multiple-choice": (
        "BertForMultipleChoice",
        {"text": "w1 w2", "choices": ["w3", "w4 w5"], "label": "B"},
        {"classes": ["A", "B"]},
    ),
    "masked-lm": ("BertForMaskedLM", {"text": "w1 w2 w3 w4 w5 w6 w7 w8"}, {}),
    "seq2seq-lm": ("T5ForConditionalGeneration", {"text": "w1 w2", "answer": "w3"}, {"response": "{answer}"}),
    "regression": ("BertForSequenceClassification", {"text": "w1", "a": 1.5, "b": "2"}, {"label_columns": ["a", "b"]}),
}


@pytest.mark.parametrize("task", HEADS)
def test_recipes_of_other_heads_run_and_verify(write, workplace, capsys, task):
    architecture, row, changes = HEADS[task]
    case = next(one for one in CASES.values() if one.architecture == architecture)
    head = workplace / "head"
    case.model(**({"num_labels": 2} if task != "seq2seq-lm" else {})).save_pretrained(head)
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(head)
    path = workplace / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "number": number}) + "\n" for number in range(60)))
    modules = ["q", "v"] if task == "seq2seq-lm" else ["query", "value"]
    fields = {"task": task, "data": str(path), "label_words": "absent", "template": "{text}", "max_steps": 1}
    fields |= {"lora_target_modules": modules, "output_dir": str(workplace / "out"), **changes}
    assert main(["train", write(model_name_or_path=str(head), **fields)]) == 0
    assert f"{TASKS[task].metric_name} after" in table(capsys.readouterr().out)
    assert main(["verify", str(workplace / "out"), "--base", str(head)]) == 0


@pytest.mark.parametrize("task", RUNS)
def test_recipes_of_these_tasks_run(write, workplace, tokenizer, capsys, task):
    model, row, changes = RUNS[task]
    copied = copy.deepcopy(tokenizer)
    path = workplace / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "number": number}) + "\n" for number in range(60)))
    if task == "chat":  # The tokenizer splits at spaces.
        copied.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
        copied.chat_template += "{% if add_generation_prompt %}assistant : {% endif %}"
        copied.save_pretrained(workplace / model)
    fields = {"task": task, "data": str(path), "label_words": "absent", "template": "{text}", "max_steps": 1}
    head = workplace / model
    if task == "several-labels":
        classifier(num_labels=3).save_pretrained(head)
    if task == "regression":
        classifier(num_labels=1).save_pretrained(head)
    assert main(["train", write(model_name_or_path=str(head), **fields, **changes)]) == 0
    printed = table(capsys.readouterr().out)
    assert f"{TASKS[task].metric_name} after" in printed and printed["a missing cell"].startswith("no text")
