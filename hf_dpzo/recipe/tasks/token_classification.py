"""One class for each word, such as the names in a text."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from hf_dpzo.data.cells import to_text
from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.recipe.tasks.labels import find_class, name_outputs, require_classes
from hf_dpzo.recipe.tasks.metrics import compute_token_accuracy
from hf_dpzo.recipe.tasks.task import Need, Row, Task, refuse_short, refuse_slow


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class TokenClassification(Task):
    """The words in the column `tokens`, and a class for each in `label_column`. The first token of a word has it.

    Words that are no text have no token, and a row that is too long loses its last words.
    """

    lora_type = TaskType.TOKEN_CLS
    metric, metric_name = "eval_accuracy", "accuracy of words"
    compute_metrics = staticmethod(compute_token_accuracy)
    roles = ("tokens",)

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless there are two classes or more."""
        require_classes(recipe)

    def check_tokenizer(self, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` for a tokenizer that does not say which token comes from where, or without room."""
        refuse_slow(recipe.task, tokenizer)
        refuse_short(recipe.max_length, tokenizer, texts=1)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models with a head for each token."""
        return AutoModelForTokenClassification

    def model_options(self, recipe: "Recipe") -> dict[str, Any]:
        """Return the number of classes and their names."""
        return name_outputs(recipe)

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the column of words, and that of their classes."""
        return [(self.role("tokens", recipe),), (recipe.label_column,)]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the words, and for the first token of each word its class."""
        column = self.role("tokens", recipe)
        words, classes = row[column], row[recipe.label_column]
        for name, cell in ((column, words), (recipe.label_column, classes)):
            if not isinstance(cell, list):
                raise ValueError(f"column={name}: it holds no list; give it a list with an entry for each word.")
        if len(words) != len(classes):
            raise ValueError(f"label_column={recipe.label_column}: a row has not one class for each word; correct it.")
        numbers = [find_class(cell, recipe, recipe.label_column) for cell in classes]
        encoded = self.encode_input(row, recipe, tokenizer)
        labels = [place if place == IGNORE_INDEX else numbers[place] for place in encoded["labels"]]
        return {**encoded, "labels": labels}

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the column of words."""
        return [self.role("tokens", recipe)]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the words and, as the label of the first token of each word, the word's number."""
        column = self.role("tokens", recipe)
        texts = [to_text(word, column) for word in row[column]]
        encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=recipe.max_length)
        places = encoded.word_ids()
        firsts = [place is not None and place not in places[:index] for index, place in enumerate(places)]
        labels = [place if first else IGNORE_INDEX for place, first in zip(places, firsts, strict=True)]
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads tokens and labels."""
        return DataCollatorForTokenClassification(tokenizer)
