"""What to do about a column that the data do not have: the field of a recipe that names it, as it would be written."""

import re
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.written import SEPARATORS, explain_separator, find_separator, find_suffix, list_columns


# What other files call the columns of a task.
OTHER_NAMES = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "question": ("query",),
    "context": ("passage", "document", "text"),
    "answers": ("answer",),
}


# What other files call a text and what follows it.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("source", "target"),
)


def explain_missing_column(name: str, present: Sequence[str], recipe: Recipe) -> str:
    """Return a sentence on the column `name` that the data do not have, and how a recipe names another one.

    Args:
        name: the column that the recipe reads.
        present: the columns of the data.
        recipe: the recipe.
    """
    told, fault = _name_field(name, recipe), describe_missing_column(name, present, recipe)
    if _find_separator(present, recipe) is not None:
        return f"{told}: {fault}."
    remedies = [_name_instead(name, present, recipe)]
    if len(present) == 1 and _may_be_split(recipe):
        remedies.append("set separator if they are not split")
    return f"{told}: {fault}; {', or '.join(remedies)}."


def describe_missing_column(name: str, present: Sequence[str], recipe: Recipe) -> str:
    """Return that the data have no column `name` but which others, or that they are not split at their separator."""
    separator = _find_separator(present, recipe)
    if separator is not None:
        return explain_separator(separator)
    return f"the data have no column {name}, only {list_columns(present)}"


def _find_separator(present: Sequence[str], recipe: Recipe) -> str | None:
    return find_separator(present) if _may_be_split(recipe) else None


def _may_be_split(recipe: Recipe) -> bool:
    """Return whether the data are a file that has a separator, and the recipe does not say which."""
    return recipe.separator is None and find_suffix(Path(recipe.data)) in (*SEPARATORS, ".txt")


def _name_field(column: str, recipe: Recipe) -> str:
    """Return the field of a recipe that names `column`, and its value; the task where the column is a task's own."""
    written = re.compile(rf"\{{{re.escape(column)}[}}:!]|\"{re.escape(column)}\"")
    for field in ("label_column", "label_columns", "template", "response", "untouched_template", "columns"):
        value = getattr(recipe, field)
        named = value if isinstance(value, list) else [value]
        if column in named or (isinstance(value, str) and written.search(value)):
            return f"{field}={value}"
    return f"task={recipe.task}"


def _name_instead(name: str, present: Sequence[str], recipe: Recipe) -> str:
    """Return what a recipe says to read another column in the place of `name`."""
    role = next((role for role in recipe.kind.roles if recipe.kind.role(role, recipe) == name), None)
    if role is not None:
        if role in present:
            return f"leave {role} out of columns to read {role}"
        pair = _find_pair(present) if role == "messages" else None
        if pair is not None:
            return f"set task: causal-lm, template: '{{{pair[0]}}}' and response: '{{{pair[1]}}}' to learn the second"
        other = next((one for one in OTHER_NAMES.get(role, ()) if one in present), None)
        if other is not None:
            return f"set columns: {{{role}: {other}}} to read that"
        return f"set columns: {{{role}: THEIRS}} with the name of theirs"
    for field in ("template", "response"):
        text = getattr(recipe, field)
        if text is not None and name in Template(template=text).fields:
            return f"write one of these in {field}={text!r}"
    return f"name one of these as {'label_columns' if recipe.label_columns else 'label_column'}"


def _find_pair(present: Sequence[str]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if {*pair} <= {*present}), None)
