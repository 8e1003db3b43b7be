"""What to do about a column that the data do not have: the field of a recipe that names it, as it would be written."""

from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.losses.template import Template
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.recipe.written import SEPARATORS, find_suffix


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
    remedies = [_name_instead(name, present, recipe)]
    if recipe.separator is None and len(present) == 1 and find_suffix(Path(recipe.data)) in (*SEPARATORS, ".txt"):
        remedies.append("set separator if they are not split")
    return f"{recipe.task}: the data have no column {name}, only {', '.join(present)}; {', or '.join(remedies)}."


def _name_instead(name: str, present: Sequence[str], recipe: Recipe) -> str:
    """Return what a recipe says to read another column in the place of `name`."""
    role = next((role for role in recipe.kind.roles if recipe.kind.role(role, recipe) == name), None)
    if role is not None:
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
