"""JSON that anybody may have written: read in the one way in which all readers agree, and held against a schema."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jsonschema


SCHEMAS = Path(__file__).parent / "schemas"


def parse(text: str) -> Any:
    """Return what `text` holds.

    Raises:
        ValueError: it is no JSON, a name stands twice in one object, of which readers take different ones, or it holds
            a constant that JSON does not have, or half of a surrogate pair, which is no text.
        RecursionError: it is too deep.
    """
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    json.dumps(value, ensure_ascii=False).encode()
    return value


@cache
def validator(schema: str) -> jsonschema.protocols.Validator:
    """Return what holds values against `schema`, a file's name."""
    # JSON schemas take 2.0 for an integer, and record layouts do not.
    whole = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, one: type(one) is int)
    kind = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=whole)
    return kind(json.loads((SCHEMAS / schema).read_text(encoding="utf-8")))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
