"""The shape of `privacy.json`, as a JSON schema that ships with the package."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema


SCHEMA_FILE = Path(__file__).parent / "schemas" / "privacy.json"


class StatementError(ValueError):
    """A `privacy.json` that can not be read."""


def check_statement(statement: Any) -> dict[str, Any]:
    """Return `statement`, or raise where it has not the shape that the schema asks for.

    Raises:
        StatementError: names the field, and what is wrong with it.
    """
    if isinstance(statement, dict) and statement.get("schema") != _schema()["$id"]:
        raise StatementError(
            f"schema={statement.get('schema')!s:.80}: this version knows {_schema()['$id']}; use the version of "
            "hf_dpzo that wrote it."
        )
    error = jsonschema.exceptions.best_match(_validator().iter_errors(statement))
    if error is not None:
        raise StatementError(f"{error.json_path.removeprefix('$.')}: {error.message:.200}; write the file anew.")
    return statement


@lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_schema())
