"""JSON from strangers: read in the one way on which all readers agree, and checked against a schema."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jsonschema


# No honest integer has more: a public seed has 20 digits.
MAX_DIGITS = 40


SCHEMA_FOLDER = Path(__file__).parent.parent / "schemas"


def parse_json(text: str) -> Any:
    """Return the value that the JSON `text` holds.

    Raises:
        ValueError: `text` is not JSON, an object has a name twice (readers disagree on which one counts), or a value is
            a constant that JSON does not have, such as NaN, or a number beyond float64, or holds half of a surrogate
            pair, which is not text.
        RecursionError: `text` is nested too deeply.
    """
    value = json.loads(
        text,
        object_pairs_hook=_refuse_duplicates,
        parse_constant=_refuse_constant,
        parse_int=_parse_integer,
        parse_float=_parse_float,
    )
    json.dumps(value, ensure_ascii=False).encode()
    return value


@cache
def load_validator(schema: str) -> jsonschema.protocols.Validator:
    """Return the validator of `schema`, the name of a file in `SCHEMA_FOLDER`."""
    # JSON Schema takes 2.0 for an integer. The layout of a record does not.
    type_checker = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    validator_class = jsonschema.validators.extend(
        jsonschema.Draft202012Validator, {"pattern": _check_pattern}, type_checker=type_checker
    )
    return validator_class(json.loads((SCHEMA_FOLDER / schema).read_text(encoding="utf-8")))


def _check_pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """Match as JSON Schema asks for: `$` is the end of the text, and for Python also before a last line break."""
    if isinstance(value, str) and re.search(re.sub(r"\$$", r"\\Z", pattern), value) is None:
        yield jsonschema.ValidationError(f"{value[:80]!a} does not match {pattern!r}")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a name is there twice")
    return mapping


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is too large for float64")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def find_fault(value: Any, schema: str) -> str | None:
    """Return a fault of `value` as `name=value: reason`, or `None` where `schema` allows it.

    Args:
        value: the parsed JSON.
        schema: the name of a file in `SCHEMA_FOLDER`.

    >>> find_fault({"LORA": {"r": 10**9}}, "adapters.json")
    'LORA.r=1000000000: maximum 4096'
    >>> find_fault({"LORA": {"megatron_core": "os"}}, "adapters.json")
    'LORA.megatron_core="os": no log may set it'
    """
    # Only the first fault, because a crafted value may have a million of them.
    error = next(load_validator(schema).iter_errors(value), None)
    if error is None:
        return None
    name = ".".join(str(part) for part in error.absolute_path)
    value = error.instance
    if error.validator == "additionalProperties" and error.validator_value is False:
        unknown = min(set(value) - set(error.schema["properties"]))
        name, value, reason = f"{name}.{unknown}".lstrip("."), value[unknown], "no log may set it"
    elif error.validator == "required":
        missing = next(required for required in error.validator_value if required not in value)
        reason = f"it has no {missing}"
    else:
        reason = f"{error.validator} {abbreviate(error.validator_value)}"
    return f"{abbreviate(name)[1:-1] or 'header'}={abbreviate(value)}: {reason}"


def abbreviate(value: Any) -> str:
    """Return `value` as JSON in ASCII, shortened to at most 80 characters.

    >>> abbreviate({"name": "a" * 100})[-10:]
    'aaaaaaa...'
    """
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def compare_json(there: Any, here: Any, path: str = "") -> list[str]:
    """Return a line for each difference between two JSON values, as `name=value there and value here`.

    Args:
        there: the value read from somewhere else, such as a log.
        here: the value that is expected here.
        path: the name of the two values in the lines.

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
    # For Python, true is 1.
    is_equal = there == here and isinstance(there, bool) == isinstance(here, bool)
    return [] if is_equal else [f"{path}={abbreviate(there)} there and {abbreviate(here)} here"]
