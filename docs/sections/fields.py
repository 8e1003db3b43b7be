"""The fields of a recipe, and the training arguments, from the dataclasses that hold them."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from unittest import mock

from hf_dpzo import ZOTrainingArguments
from hf_dpzo.arguments import unsupported
from hf_dpzo.arguments.unsupported import ALWAYS_REFUSED
from hf_dpzo.recipe.help import COMMON_FIELDS, PRIVACY_FIELDS, RECIPE_GROUPS
from hf_dpzo.recipe.recipe import Recipe

from sections.markdown import code, kind, plain, table


HEAD = ("name", "takes", "default", "what it is")


def build_recipe_fields() -> str:
    """Return the tables of the fields that a recipe has besides the training arguments, in the groups of the help."""
    groups: dict[str, list[dataclasses.Field]] = {}
    group = ""
    for field in dataclasses.fields(Recipe):
        group = RECIPE_GROUPS.get(field.name, group)
        groups.setdefault(group, []).append(field)
    return _build_groups(groups)


def build_added_arguments() -> str:
    """Return the tables of the training arguments that are not stock's, or whose default is another one."""
    fields = [field for field in dataclasses.fields(ZOTrainingArguments) if _is_added(field)]
    private, others = _split(fields, PRIVACY_FIELDS)
    return _build_groups({"privacy": private, "method, steps and speed": others})


def build_inherited_arguments() -> str:
    """Return the tables of the training arguments that are stock's, with what transformers says of them."""
    fields = [field for field in dataclasses.fields(ZOTrainingArguments) if field.init and not _is_added(field)]
    often, others = _split([field for field in fields if field.name not in ALWAYS_REFUSED], COMMON_FIELDS)
    return _build_groups({"often set": often, "the others": others})


def build_refusals() -> str:
    """Return the table of the training arguments that a run may refuse, and why."""
    rows = (
        [code(name), "any but the default" if name in ALWAYS_REFUSED else "some", plain(reason)]
        for name, reason in sorted(list_refusals().items())
    )
    return table(("name", "which values", "why, and what to do instead"), rows)


def _is_added(field: dataclasses.Field) -> bool:
    return field.name in ZOTrainingArguments.__annotations__


def _split(
    fields: Sequence[dataclasses.Field], names: Collection[str]
) -> tuple[list[dataclasses.Field], list[dataclasses.Field]]:
    """Return the fields that are among `names`, and the others."""
    return [field for field in fields if field.name in names], [field for field in fields if field.name not in names]


def _build_groups(groups: Mapping[str, Sequence[dataclasses.Field]]) -> str:
    parts = ((title.capitalize(), table(HEAD, map(_describe, fields))) for title, fields in groups.items())
    return "\n".join(f"### {title}\n\n{rows}" for title, rows in parts)


def list_refusals() -> dict[str, str]:
    """Return the reason of each refusal, by the name of the argument."""
    found: dict[str, str] = {}

    def note(_: Any, refused: Mapping[str, tuple[Any, str]]) -> None:
        found.update({name: reason for name, (_, reason) in refused.items()})

    args = ZOTrainingArguments(output_dir="out", target_epsilon=1, target_delta=1e-5)
    with mock.patch.object(unsupported, "_refuse", note):
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
