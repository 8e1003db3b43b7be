"""The right one of several continuations of a text."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice, PreTrainedTokenizerBase

from hf_dpzo.data.cells import to_text
from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.tasks.labels import find_class, require_classes
from hf_dpzo.recipe.tasks.metrics import compute_accuracy
from hf_dpzo.recipe.tasks.task import Need, Row, Task


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class MultipleChoice(Task):
    """The template is the text. The choices are a list in the column `choices`, or columns that `columns` names."""

    trained_modules = ("classifier",)
    metric, metric_name = "eval_accuracy", "accuracy"
    compute_metrics = staticmethod(compute_accuracy)
    roles = ("choices",)

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless the choices have names, such as 0 to 3 or A to D."""
        super().check(recipe)
        require_classes(recipe)

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models that score each choice."""
        return AutoModelForMultipleChoice

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template, of the choices and of the right one."""
        text = Template(template=recipe.template).fields
        return [text, *((name,) for name in self._choice_columns(recipe)), (recipe.label_column,)]

    def encode(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the text with each choice, `[choices][tokens]`, and the number of the right one."""
        label = find_class(row[recipe.label_column], recipe, recipe.label_column)
        return {**self.encode_input(row, recipe, tokenizer), "labels": label}

    def input_columns(self, recipe: "Recipe") -> list[str]:
        """Return the columns of the template and of the choices."""
        return [*Template(template=recipe.template).fields, *self._choice_columns(recipe)]

    def encode_input(self, row: Row, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the tokens of the text with each choice; the label is the first choice, whichever is right."""
        template = Template(template=recipe.template)
        text = template.render(template.read_columns(row))
        encoded = tokenizer(
            [text] * len(recipe.labels),
            self._read_choices(row, recipe),
            truncation="longest_first",
            max_length=recipe.max_length,
        )
        return {**encoded, "labels": 0}

    def _choice_columns(self, recipe: "Recipe") -> list[str]:
        named = recipe.column_names.get("choices", "choices")
        return [str(name) for name in named] if isinstance(named, list) else [str(named)]

    def _read_choices(self, row: Row, recipe: "Recipe") -> list[str]:
        columns = self._choice_columns(recipe)
        cells = [row[name] for name in columns] if len(columns) > 1 else row[columns[0]]
        cells = cells["text"] if isinstance(cells, dict) and "text" in cells else cells  # As in ARC.
        if not isinstance(cells, list) or len(cells) != len(recipe.labels):
            raise ValueError(
                f"columns={columns[0]}: a row has not {len(recipe.labels)} choices, one for each class; name as many "
                "classes as all rows have choices."
            )
        return [to_text(cell, columns[0]) for cell in cells]

    def build_collator(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> Callable:
        """Return a collator that pads all choices of all rows to one length."""
        return DataCollatorForMultipleChoice(tokenizer)
