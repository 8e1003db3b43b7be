"""Labels of rows: classes, numbers, and several of either. Messages name columns and classes, never a row's value."""

from typing import TYPE_CHECKING, Any

from hf_dpzo.data.cells import Classes, to_number, to_text


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


def require_classes(recipe: "Recipe", *, least: int = 2) -> None:
    """Raise `ValueError` unless the recipe names `least` classes."""
    Classes(names=recipe.labels)
    if len(recipe.labels) < least:
        number = {1: "one class", 2: "two classes"}[least]
        raise ValueError(
            f"label_words={recipe.label_words}: {recipe.task} needs {number} or more, as {{class: word}} or as a list "
            "in classes; they are public, so they are never read off the data."
        )


def find_class(cell: Any, recipe: "Recipe", column: str) -> int:
    """Return the number of the class of a cell, or raise `ValueError` if it is none of the recipe's classes."""
    found = Classes(names=recipe.labels).find(cell, column)
    if found is None:
        raise ValueError(
            f"{name_classes_field(recipe)}={', '.join(recipe.labels)}: a row has another label in the column "
            f"{column}; name every class, as the data write it."
        )
    return found


def name_classes_field(recipe: "Recipe") -> str:
    """Return the field of `recipe` that names the classes."""
    return "classes" if recipe.label_words is None else "label_words"


def read_number(cell: Any, column: str) -> float:
    """Return the number in a cell, or raise `ValueError` if it holds none."""
    number = to_number(to_text(cell, column))
    if number is None:
        raise ValueError(
            f"label_column={column}: a row holds a text there and no number; choose a task with classes, or correct it."
        )
    return number


def name_outputs(recipe: "Recipe") -> dict[str, Any]:
    """Return the configuration of a head with one output for each class, in class order, with their names.

    The names are the words of `label_words`, or else the classes themselves.
    """
    words = [word.strip() for word in recipe.words]
    names = words if words and all(words) and len({*words}) == len(words) else list(recipe.labels)
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
