"""What a model of each kind of task answers, and what it is asked by."""

import copy
import json
from typing import Any

import pytest
import torch
import transformers as hf

from hf_dpzo.card.use import WRITING_TASKS
from hf_dpzo.recipe.loading import choose_padding
from hf_dpzo.recipe.recipe import parse_recipe
from hf_dpzo.recipe.tasks import TASKS
from hf_dpzo.recipe.tasks.chat import Chat
from hf_dpzo.use.answers import _READERS, AskedBatch, read_answers
from hf_dpzo.use.model import TrainedModel

from support.data_recipes import letter_tokenizer
from support.heads import BERT, T5
from support.models import causal_lm, word_tokenizer


COMMON = {"data": "rows.csv", "model_name_or_path": "m", "method": "mezo", "max_steps": "1", "output_dir": "out"}
COMMON |= {"use_cpu": "true", "expected_batch_size": "2"}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}${% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
WORDS = ["w1", "w2 w3 w4 w5", "w6 w7", "w8 w9 w1 w2 w3 w4"]


def recipe(**fields):
    return parse_recipe({**COMMON, **fields})[0]


def bert(kind: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(hf, kind)(hf.BertConfig(**{**BERT, "initializer_range": 0.5, **changes})).eval()


def t5() -> torch.nn.Module:
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5)).eval()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return causal_lm(initializer_range=0.5)


def test_a_card_says_generate_for_the_tasks_that_write():
    assert set(WRITING_TASKS) == {name for name, task in TASKS.items() if task.writes}


# The fields of a recipe, a model, rows with labels, and the names in an answer.
CASES = {
    "several-labels": (
        {"classes": ["a", "b", "c"]},
        lambda: bert("BertForSequenceClassification", problem_type="multi_label_classification"),
        [{"text": text, "label": ["a", "c"]} for text in WORDS],
        {"labels", "scores"},
    ),
    "regression": (
        {},
        lambda: bert("BertForSequenceClassification", num_labels=1, problem_type="regression"),
        [{"text": text, "label": "2.5"} for text in WORDS],
        {"number"},
    ),
    "token-classification": (
        {"classes": ["O", "B", "I"]},
        lambda: bert("BertForTokenClassification"),
        [{"tokens": text.split(), "label": ["B"] * len(text.split())} for text in WORDS],
        {"labels", "scores"},
    ),
    "question-answering": (
        {},
        lambda: bert("BertForQuestionAnswering", num_labels=2),
        [{"question": "w1", "context": text, "answers": {"text": [text[:2]], "answer_start": [0]}} for text in WORDS],
        {"text", "score"},
    ),
    "multiple-choice": (
        {"classes": ["A", "B"]},
        lambda: bert("BertForMultipleChoice"),
        [{"text": text, "choices": ["w1 w2", "w3"], "label": "B"} for text in WORDS],
        {"label", "score", "scores"},
    ),
    "masked-lm": (
        {"template": "{text} ."},
        lambda: bert("BertForMaskedLM"),
        [{"text": f"{text} [MASK]"} for text in WORDS],
        {"text", "words", "scores"},
    ),
    "seq2seq-lm": ({"response": "{answer}"}, t5, [{"text": text, "answer": "good"} for text in WORDS], {"text"}),
    "causal-lm": (
        {"template": "{text} :", "response": "{answer}"},
        llama,
        [{"text": text, "answer": "good"} for text in WORDS],
        {"text"},
    ),
    "generation": (
        {"response": "{answer}", "reward": "token_f1", "max_new_tokens": "3"},
        llama,
        [{"text": text, "answer": "good"} for text in WORDS],
        {"text"},
    ),
}


def build(task: str) -> tuple[TrainedModel, list[dict[str, Any]], set[str]]:
    fields, make, rows, names = CASES[task]
    asked = recipe(task=task, **fields)
    tokenizer = copy.deepcopy(word_tokenizer())
    choose_padding(tokenizer, asked)
    return TrainedModel(model=make(), tokenizer=tokenizer, recipe=asked), rows, names


@pytest.fixture(params=CASES)
def built(request):
    return build(request.param)


def test_every_task_answers_or_writes():
    assert {name for name, task in TASKS.items() if not task.writes} == set(_READERS)


def test_an_answer_is_that_of_its_row_alone_and_of_no_label(built):
    model, rows, names = built
    answers = model.predict(rows, batch_size=3)
    assert {name for answer in answers for name in answer} == names
    for row, answer in zip(rows, answers, strict=True):
        asked = {name: row[name] for name in model.recipe.kind.input_columns(model.recipe)}
        assert rounded(model.predict(asked)) == rounded(answer)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def test_every_task_is_evaluated(built):
    model, rows, _ = built
    measured = model.evaluate(rows)
    assert measured["rows"] == len(rows) and torch.tensor(measured["loss"]).isfinite()
    assert model.recipe.kind.metric.removeprefix("eval_") in measured


def test_each_word_has_a_class_or_none_where_there_is_no_room():
    model, _, _ = build("token-classification")
    model.recipe.max_length = 3
    labels = model.predict({"tokens": ["w1", "", "w2", "w3", "w4"]})["labels"]
    assert [label is None for label in labels] == [False, True, False, False, True]


def test_a_part_of_a_context_is_answered_as_it_is_written():
    model, rows, _ = build("question-answering")
    for row, answer in zip(rows, model.predict(rows), strict=True):
        assert answer["text"] in row["context"] and 0 <= answer["score"] <= 1


def test_chats_are_continued_where_the_assistant_answers():
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = TrainedModel(
        model=causal_lm(vocab_size=128, max_position_embeddings=512), tokenizer=tokenizer, recipe=recipe(task="chat")
    )
    talk = [{"role": "user", "content": "Hi"}]
    encoded = model.recipe.kind.encode_input({"messages": talk}, model.recipe, tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"])[-len("<assistant>") :] == [*"<assistant>"]
    assert model.generate({"messages": talk}, max_new_tokens=4) == model.generate("Hi", max_new_tokens=4)


def test_an_answer_at_the_end_of_a_chat_is_not_shown_to_the_model(monkeypatch):
    """Rows that were set aside end with the answer that is asked for."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT
    model = TrainedModel(
        model=causal_lm(vocab_size=128, max_position_embeddings=512), tokenizer=tokenizer, recipe=recipe(task="chat")
    )
    seen, encode = [], Chat.encode_input

    def watch(task, row, *given):
        seen.append(encode(task, row, *given))
        return seen[-1]

    monkeypatch.setattr(Chat, "encode_input", watch)
    asked = [{"from": "human", "value": "Hi"}]
    answered = [*asked, {"from": "gpt", "value": "Yes"}, {"role": "assistant", "content": None}]
    rows = [{"messages": asked}, {"messages": answered}, {"messages": [*answered, *asked]}, {"messages": answered[1:]}]
    assert model.generate(rows, max_new_tokens=2)[3] is None
    alone, last, within = [tokenizer.decode(row["input_ids"]).replace(" ", "") for row in seen]
    assert alone == last == "<user>Hi$<assistant>" and "Yes" in within


def asked_alone(recipe):
    """A batch of one row, of which nothing but the recipe is read."""
    return AskedBatch(rows=[{}], inputs={}, recipe=recipe, tokenizer=None)


def test_classes_are_called_as_in_the_data():
    asked = recipe(label_words=json.dumps({"007": " bad", "yes": " good"}))
    (answer,) = read_answers(torch.tensor([[0.0, 2.0]]), asked_alone(asked))
    assert answer["label"] == "yes" and answer["scores"]["007"] == pytest.approx(1 - answer["score"])


def test_several_labels_and_numbers_have_names():
    several = recipe(task="several-labels", label_columns=["a", "b"])
    (answer,) = read_answers(
        torch.tensor([[3.0, -3.0]]), AskedBatch(rows=[{}], inputs={}, recipe=several, tokenizer=None)
    )
    assert answer["labels"] == ["a"] and answer["scores"]["b"] < 0.1
    numbers = recipe(task="regression", label_columns=["stars", "price"])
    (answer,) = read_answers(
        torch.tensor([[4.0, 1.5]]), AskedBatch(rows=[{}], inputs={}, recipe=numbers, tokenizer=None)
    )
    assert answer == {"numbers": {"stars": 4.0, "price": 1.5}}


def test_a_model_that_classifies_writes_nothing_and_one_without_a_recipe_answers_nothing():
    model, _, _ = build("regression")
    with pytest.raises(ValueError, match=r"task=regression: .* use predict\."):
        model.generate("w1")
    model.recipe = None
    with pytest.raises(ValueError, match="recipe: model keeps none"):
        model.predict("w1")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("regression", {"words": "w1"}, "column=text: a row has no such column; the model reads text"),
        ("multiple-choice", "w1", "the model reads text, choices; pass mappings"),
    ],
)
def test_rows_without_the_columns_that_are_read_are_refused(task, row, message):
    model, _, _ = build(task)
    with pytest.raises(ValueError, match=message):
        model.predict([row])
