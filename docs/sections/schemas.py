"""What JSON files hold, from the schemas by which they are checked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dpzo.io.strict_json import load_validator

from sections.markdown import code, plain, table


EXAMPLE = Path(__file__).parents[2] / "model_cards/quickstart/privacy.json"


# What a limit is called. The large ones are of the number format, and say nothing.
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
LARGEST = 1e15


def build_privacy_schema() -> str:
    """Return the table of what `privacy.json` holds, with what that of the quick start's model says."""
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return _build_schema("privacy.json", example)


def build_header_schema() -> str:
    """Return the table of what the header of a log holds."""
    return _build_schema("trajectory-header.json", None)


def build_parts_schema() -> str:
    """Return the table of what `parts.json` holds."""
    return _build_schema("parts.json", None)


def _build_schema(name: str, example: Any) -> str:
    """Return a table of the values that stand alone, and one for each object, with its name above it."""
    rows = list(list_values(load_validator(name).schema))
    objects = [path for path, *_ in rows if "." not in path and any(_is_in(other, path) for other, *_ in rows)]
    alone = [row for row in rows if not any(row[0] == path or _is_in(row[0], path) for path in objects)]
    parts = [_build_table(alone, "", example)] if alone else []
    for path in objects:
        (described,) = (row for row in rows if row[0] == path)
        inner = [row for row in rows if _is_in(row[0], path)]
        text = f"{described[2]}\n\n" if described[2] else ""
        parts.append(f"### `{path}`\n\n{text}{_build_table(inner, path, example)}")
    return "\n".join(parts)


def _is_in(path: str, outer: str) -> bool:
    return path.startswith((f"{outer}.", f"{outer}[]"))


def _build_table(rows: Sequence[Sequence[str]], outer: str, example: Any) -> str:
    head = ["name", "what it holds", "what it is"] + ["in the quick start's"] * (example is not None)
    shown = [] if example is None else [[_shorten(_look_up(example, path))] for path, *_ in rows]
    cells = [[code(path.removeprefix(outer).removeprefix(".")), *others] for path, *others in rows]
    return table(head, [cell + more for cell, more in zip(cells, shown or [[]] * len(cells), strict=True)])


def list_values(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield path, type and description of each value in an object of `schema`, and of the values in them."""
    yield from _list_properties(schema, schema, "", ())


def _list_properties(
    value: Mapping[str, Any], schema: Mapping[str, Any], path: str, seen: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    for name, inner in value.get("properties", {}).items():
        inner, within = _resolve(inner, schema, seen)
        here = f"{path}.{name}".lstrip(".")
        yield here, _describe(inner), plain(inner.get("description"))
        yield from _list_properties(inner, schema, here, within)
        items, within = _resolve(inner.get("items", {}), schema, within)
        yield from _list_properties(items, schema, f"{here}[]", within)


def _resolve(value: Any, schema: Mapping[str, Any], seen: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Return what `value` stands for, and the references that led there; what holds itself is described once."""
    reference = value.get("$ref")
    if reference is None:
        return value, seen
    if reference in seen:
        return {"type": "object", "description": "Another of the same kind."}, seen
    for name in reference.removeprefix("#/").split("/"):
        schema = schema[name]
    return {**schema, **value}, (*seen, reference)


def _describe(value: Mapping[str, Any]) -> str:
    if "const" in value:
        return code(json.dumps(value["const"]))
    if "enum" in value:
        return " or ".join(code(json.dumps(choice)) for choice in value["enum"])
    kinds = value.get("type", "any")
    text = " or ".join(kinds) if isinstance(kinds, list) else kinds
    if text == "array" and "items" in value and "type" in value["items"]:
        text = f"array of {value['items']['type']}s"
    limits = [f"{word} {value[name]:g}" for name, word in LIMITS.items() if abs(value.get(name, LARGEST)) < LARGEST]
    return ", ".join([text, *limits])


def _look_up(example: Any, path: str) -> Any:
    for name in path.split("."):
        example = example.get(name.removesuffix("[]")) if isinstance(example, Mapping) else None
        if name.endswith("[]"):
            example = example[0] if example else None
    return example


def _shorten(value: Any) -> str:
    if value is None or isinstance(value, dict | list):
        return ""
    text = json.dumps(value, ensure_ascii=False)
    return code(text if len(text) <= 50 else f"{text[:47]}...")
