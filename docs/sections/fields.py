"""The fields of a recipe, and the training arguments, from the dataclasses that hold them."""

import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

from transformers import TrainingArguments

from hf_dpzo import ZOTrainingArguments
from hf_dpzo.arguments import unsupported
from hf_dpzo.recipe.recipe import Recipe

from sections.markdown import code, kind, plain, table


HEAD = ("name", "takes", "default", "what it is")


def build_recipe_fields() -> str:
    """Return the table of the fields that a recipe has besides the training arguments."""
    return table(HEAD, (_describe(field) for field in dataclasses.fields(Recipe)))


def build_added_arguments() -> str:
    """Return the table of the training arguments that are not stock's, or whose default is another one."""
    fields = {field.name: field for field in dataclasses.fields(ZOTrainingArguments)}
    return table(HEAD, (_describe(fields[name]) for name in ZOTrainingArguments.__annotations__))


def build_inherited_arguments() -> str:
    """Return the table of the training arguments that are stock's, with what transformers says of them."""
    changed, refused = ZOTrainingArguments.__annotations__, {name.partition(".")[0] for name in list_refusals()}
    fields = (field for field in dataclasses.fields(TrainingArguments) if field.name not in changed and field.init)
    rows = (_describe(field) for field in fields)
    return table(HEAD, ([f"{row[0]} \\*" if row[0].strip("`") in refused else row[0], *row[1:]] for row in rows))


def build_refusals() -> str:
    """Return the table of the training arguments that a run may refuse, and why."""
    return table(
        ("name", "why, and what to do instead"),
        ([code(name), plain(reason)] for name, reason in sorted(list_refusals().items())),
    )


def list_refusals() -> dict[str, str]:
    """Return the reason of each refusal, by the name of the argument."""
    found: dict[str, str] = {}

    def note(_: Any, refused: Mapping[str, tuple[Any, str]]) -> None:
        found.update({name: reason for name, (_, reason) in refused.items()})

    args = ZOTrainingArguments(output_dir="out", target_epsilon=1, target_delta=1e-5)
    with mock.patch.object(unsupported, "_refuse_first", note):
        unsupported.refuse_arguments(args)
    return found


def _describe(field: dataclasses.Field) -> list[str]:
    text = plain(str(field.metadata.get("help", "")))
    choices = field.metadata.get("choices")
    if choices:
        text += f" One of {', '.join(code(choice) for choice in choices)}."
    return [code(field.name), kind(field.type), _describe_default(field), text]


def _describe_default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    value = getattr(value, "value", value)  # Of an enumeration.
    return "" if value is None or value == "" else code(value)
