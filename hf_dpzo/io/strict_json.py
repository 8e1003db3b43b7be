"""JSON that anybody may have written: read in the one way in which all readers agree, and held against a schema."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jsonschema


SCHEMA_FOLDER = Path(__file__).parent.parent / "schemas"


def parse_json(text: str) -> Any:
    """Return what `text` holds.

    Raises:
        ValueError: it is no JSON, a name stands twice in one object, of which readers take different ones, or it holds
            a constant that JSON does not have, or half of a surrogate pair, which is no text.
        RecursionError: it is too deep.
    """
    value = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    json.dumps(value, ensure_ascii=False).encode()
    return value


@cache
def load_validator(schema: str) -> jsonschema.protocols.Validator:
    """Return what holds values against `schema`, a file's name."""
    # JSON schemas take 2.0 for an integer, and record layouts do not.
    whole = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, one: type(one) is int)
    kind = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=whole)
    return kind(json.loads((SCHEMA_FOLDER / schema).read_text(encoding="utf-8")))


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def find_fault(value: Any, schema: str) -> str | None:
    """Return what is wrong with `value`, as `name=value: reason`, or `None` where `schema`, a file's name, allows it.

    >>> find_fault({"LORA": {"r": 10**9}}, "adapters.json")
    'LORA.r=1000000000: maximum 4096'
    >>> find_fault({"LORA": {"megatron_core": "os"}}, "adapters.json")
    'LORA.megatron_core="os": no log may set it'
    """
    # The first of them, for a crafted value may have a million.
    error = next(load_validator(schema).iter_errors(value), None)
    if error is None:
        return None
    name, value = ".".join(str(part) for part in error.absolute_path), error.instance
    if error.validator == "additionalProperties" and error.validator_value is False:
        unknown = min(set(value) - set(error.schema["properties"]))
        name, value, reason = f"{name}.{unknown}".lstrip("."), value[unknown], "no log may set it"
    elif error.validator == "required":
        missing = next(one for one in error.validator_value if one not in value)
        reason = f"it has no {missing}"
    else:
        reason = f"{error.validator} {abbreviate(error.validator_value)}"
    return f"{abbreviate(name)[1:-1] or 'header'}={abbreviate(value)}: {reason}"


def abbreviate(value: Any) -> str:
    """Return `value` as JSON in ASCII, of 80 characters at most.

    >>> abbreviate({"name": "a" * 100})[-10:]
    'aaaaaaa...'
    """
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def compare_json(there: Any, here: Any, path: str = "") -> list[str]:
    """Return what differs between two headers, as `name=value there and value here`.

    >>> compare_json({"method": {"clip_norm": 1.0}}, {"method": {"clip_norm": 0.5}})
    ['method.clip_norm=1.0 there and 0.5 here']
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        names = sorted({*there, *here})
        return [
            line
            for name in names
            for line in compare_json(there.get(name), here.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if there == here else [f"{path}={abbreviate(there)} there and {abbreviate(here)} here"]
