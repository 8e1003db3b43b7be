"""Any number of labels for each text."""

from typing import TYPE_CHECKING, Any

from hf_dpzo.data.cells import Classes, to_text
from hf_dpzo.recipe.tasks.labels import find_class, name_outputs, require_classes
from hf_dpzo.recipe.tasks.metrics import compute_micro_f1
from hf_dpzo.recipe.tasks.sequence_classification import TextHead
from hf_dpzo.recipe.tasks.task import Need, Row


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


_NO_OR_YES = Classes(names=("0", "1")), Classes(names=("false", "true"))


class SeveralLabels(TextHead):
    """The classes that `label_column` lists, or those of `label_columns` that say yes."""

    metric, metric_name = "eval_f1", "micro F1"
    compute_metrics = staticmethod(compute_micro_f1)

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless the classes are named."""
        super().check(recipe)
        if recipe.label_separator == "":
            raise ValueError("label_separator='': it is no text; name what stands between labels, or leave it out.")
        if recipe.label_columns is None:
            require_classes(recipe)
        elif recipe.labels and len(recipe.labels) != len(recipe.label_columns):
            raise ValueError(
                f"classes={', '.join(recipe.labels)}: label_columns has {len(recipe.label_columns)} columns; name one "
                "class for each, or none."
            )

    def model_options(self, recipe: "Recipe") -> dict[str, Any]:
        """Return the number of classes, their names, and that a row may have several."""
        columns = [*(recipe.label_columns or [])]
        named = {
            "num_labels": len(columns),
            "id2label": dict(enumerate(columns)),
            "label2id": {name: number for number, name in enumerate(columns)},
        }
        return {**(name_outputs(recipe) if recipe.labels else named), "problem_type": "multi_label_classification"}

    def needs(self, recipe: "Recipe") -> list[Need]:
        """Return the columns of the template, and those of labels, of which one suffices."""
        text, *_ = super().needs(recipe)
        return [text, tuple(self.label_columns(recipe))]

    def read_labels(self, row: Row, recipe: "Recipe") -> list[float]:
        """Return 1 for each class that the row has, and 0 for each other one."""
        if recipe.label_columns is not None:
            return [_read_yes(row[name], name) for name in recipe.label_columns]
        cell = row[recipe.label_column]
        if not isinstance(cell, list):
            text = to_text(cell, recipe.label_column)
            parts = [text] if recipe.label_separator is None else text.split(recipe.label_separator)
            cell = [part for part in map(str.strip, parts) if part]
        present = {find_class(item, recipe, recipe.label_column) for item in cell}
        return [float(number in present) for number in range(len(recipe.labels))]


def _read_yes(cell: Any, column: str) -> float:
    if to_text(cell, column).strip() == "":
        return 0.0
    found = next((answer for classes in _NO_OR_YES if (answer := classes.find(cell, column)) is not None), None)
    if found is None:
        raise ValueError(
            f"label_columns={column}: a row has something else there than 0 or 1, or no or yes; convert the column."
        )
    return float(found)
