"""Numbers for each text, by a head whose loss is the squared error."""

from typing import TYPE_CHECKING, Any

from hf_dpzo.recipe.tasks.labels import read_number
from hf_dpzo.recipe.tasks.sequence_classification import TextHead
from hf_dpzo.recipe.tasks.task import Row


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


class Regression(TextHead):
    """A number from `label_column`, or one from each of `label_columns`."""

    def model_options(self, recipe: "Recipe") -> dict[str, Any]:
        """Return the number of outputs, and what they are."""
        return {"num_labels": len(self.label_columns(recipe)), "problem_type": "regression"}

    def read_labels(self, row: Row, recipe: "Recipe") -> Any:
        """Return the number of a row, or a list of them."""
        numbers = [read_number(row[name], name) for name in self.label_columns(recipe)]
        return numbers if len(numbers) > 1 else numbers[0]
