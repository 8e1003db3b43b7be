"""One class for each text, by a classification head."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.labels import find_class, name_outputs, require_classes
from hf_dpzo.recipe.tasks.metrics import compute_accuracy
from hf_dpzo.recipe.tasks.task import Need, Row, Task


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class TextHead(Task):
    """A head that reads one text of the template. Subclasses say what its labels are."""

    lora_type = TaskType.SEQ_CLS

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models with a head for whole texts."""
        return AutoModelForSequenceClassification

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template, and each one with a label."""
        return [Template(template=recipe.template).fields, *((name,) for name in self.label_columns(recipe))]

    def label_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns that hold labels."""
        return [*(recipe.label_columns or [recipe.label_column])]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the text, and its label or labels."""
        return {**self.encode_input(row, recipe, tokenizer), "labels": self.read_labels(row, recipe)}

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of the template."""
        return [*Template(template=recipe.template).fields]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the text."""
        return Template(template=recipe.template).encode(row, tokenizer, recipe.max_length)

    def read_labels(self, row: Row, recipe: "Recipe") -> Any:
        """Return the label of a row, or its labels."""
        return find_class(row[recipe.label_column], recipe, recipe.label_column)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads."""
        return DataCollatorWithPadding(tokenizer)


class SequenceClassification(TextHead):
    """One of several classes. The model's `id2label` says which output is which."""

    metric, metric_name = "eval_accuracy", "accuracy"
    compute_metrics = staticmethod(compute_accuracy)

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless there are two classes or more."""
        super().check(recipe)
        require_classes(recipe)

    def model_options(self, recipe: "Recipe") -> dict[str, Any]:
        """Return the number of classes and their names."""
        return name_outputs(recipe)

    def label_columns(self, recipe: "Recipe") -> list[str]:
        """Return the column of the class."""
        return [recipe.label_column]
