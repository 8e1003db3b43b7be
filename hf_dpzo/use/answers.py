"""What a model's scores say of each row: its class by the data's own name, a number, words, or a part of a text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_dpzo.data.cells import to_text
from hf_dpzo.losses.per_example import IGNORE_INDEX, Scores
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.tasks.question_answering import QuestionAnswering


Answer = dict[str, Any]


# The most tokens of an answer that is a part of a text, as in pipelines of transformers.
_LONGEST_ANSWER = 15


@dataclass(frozen=True, kw_only=True)
class AskedBatch:
    """Rows that a model was asked together.

    Args:
        rows: the rows.
        inputs: the inputs of the model, `[batch, tokens]`.
        recipe: the recipe, with a task that writes no text.
        tokenizer: the tokenizer.
    """

    rows: Sequence[Mapping[str, Any]]
    inputs: Mapping[str, torch.Tensor]
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase


def read_answers(scores: Scores, batch: AskedBatch) -> list[Answer]:
    """Return the answer to each row of `batch`, by the scores of the task's loss, `[batch, ...]`."""
    return _READERS[batch.recipe.task](scores, batch)


def _read_classes(scores: torch.Tensor, batch: AskedBatch) -> list[Answer]:
    recipe = batch.recipe
    return [_name_best(row, recipe.labels) for row in scores.softmax(dim=-1).tolist()]


def _name_best(probabilities: Sequence[float], names: Sequence[str]) -> Answer:
    best = max(range(len(names)), key=probabilities.__getitem__)
    named = dict(zip(names, probabilities, strict=True))
    return {"label": names[best], "score": probabilities[best], "scores": named}


def _read_several(scores: torch.Tensor, batch: AskedBatch) -> list[Answer]:
    recipe = batch.recipe
    names = recipe.labels or tuple(recipe.label_columns)
    shares = [dict(zip(names, row, strict=True)) for row in scores.sigmoid().tolist()]
    return [{"labels": [name for name in names if row[name] > 0.5], "scores": row} for row in shares]


def _read_numbers(scores: torch.Tensor, batch: AskedBatch) -> list[Answer]:
    recipe = batch.recipe
    values = scores.reshape(len(scores), -1).tolist()
    if recipe.label_columns is None or len(recipe.label_columns) == 1:
        return [{"number": row[0]} for row in values]
    return [{"numbers": dict(zip(recipe.label_columns, row, strict=True))} for row in values]


def _read_words(scores: torch.Tensor, batch: AskedBatch) -> list[Answer]:
    """Return the class of each word; `None` for a word that has no token, or for which there was no room."""
    recipe = batch.recipe
    (column,) = recipe.kind.input_columns(recipe)
    rows, best, answers = batch.rows, scores.softmax(dim=-1).max(dim=-1), []
    labels = batch.inputs["labels"].tolist()  # The number of the word at its first token.
    for row, places, chosen, shares in zip(rows, labels, best.indices.tolist(), best.values.tolist(), strict=True):
        answer: Answer = {name: [None] * len(row[column]) for name in ("labels", "scores")}
        for word, number, share in zip(places, chosen, shares, strict=True):
            if word != IGNORE_INDEX:
                answer["labels"][word], answer["scores"][word] = recipe.labels[number], share
        answers.append(answer)
    return answers


def _read_parts(scores: tuple[torch.Tensor, torch.Tensor], batch: AskedBatch) -> list[Answer]:
    """Return the most probable part of each context; no text where that is the first token, as in SQuAD 2."""
    answers, task, recipe = [], QuestionAnswering(), batch.recipe
    context = task.input_columns(recipe)[1]
    for place, row in enumerate(batch.rows):
        encoded = task.tokenize(row, recipe, batch.tokenizer)
        count = len(encoded["input_ids"])
        own = batch.inputs["attention_mask"][place].bool()
        start, end = (one[place][own][:count].softmax(dim=0) for one in scores)
        of_context = [part == 1 for part in encoded.sequence_ids()]
        first, last, score = _find_part(start.tolist(), end.tolist(), of_context)
        text = ""
        if of_context[first]:
            offsets = encoded["offset_mapping"]
            text = to_text(row[context], context)[offsets[first][0] : offsets[last][1]]
        answers.append({"text": text, "score": score})
    return answers


def _find_part(start: Sequence[float], end: Sequence[float], of_context: Sequence[bool]) -> tuple[int, int, float]:
    """Return the first and the last token of the most probable answer, and its probability.

    >>> _find_part([0.25, 0.25, 0.5, 0.0], [0.25, 0.0, 0.25, 0.5], [False, True, True, True])
    (2, 3, 0.25)
    """
    best = (0, 0, start[0] * end[0])
    for first, allowed in enumerate(of_context):
        for last in range(first, min(first + _LONGEST_ANSWER, len(end)) if allowed else first):
            score = start[first] * end[last]
            if of_context[last] and score > best[2]:
                best = (first, last, score)
    return best[0], best[1], round(best[2], 12)


def _read_hidden(scores: torch.Tensor, batch: AskedBatch) -> list[Answer]:
    """Return each text with the words that it hides, and these words by themselves."""
    answers, inputs, tokenizer = [], batch.inputs, batch.tokenizer
    for tokens, mask, own in zip(inputs["input_ids"], inputs["attention_mask"].bool(), scores, strict=True):
        kept, best = tokens[mask], own[mask].softmax(dim=-1).max(dim=-1)
        hidden = kept == tokenizer.mask_token_id
        filled = torch.where(hidden, best.indices, kept)
        words = [tokenizer.decode([token]) for token in best.indices[hidden].tolist()]
        text = tokenizer.decode(filled, skip_special_tokens=True)
        answers.append({"text": text, "words": words, "scores": best.values[hidden].tolist()})
    return answers


_READERS: Mapping[str, Callable[[Any, AskedBatch], list[Answer]]] = {
    "prompt-classification": _read_classes,
    "sequence-classification": _read_classes,
    "feature-classification": _read_classes,
    "multiple-choice": _read_classes,
    "several-labels": _read_several,
    "regression": _read_numbers,
    "token-classification": _read_words,
    "question-answering": _read_parts,
    "masked-lm": _read_hidden,
}
