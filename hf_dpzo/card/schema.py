"""The shape of `privacy.json`, as a JSON schema that ships with the package."""

from typing import Any

import jsonschema

from hf_dpzo.io.strict_json import SCHEMA_FOLDER, load_validator


SCHEMA_FILE = SCHEMA_FOLDER / "privacy.json"


class StatementError(ValueError):
    """A `privacy.json` that can not be read."""


def check_statement(statement: Any) -> dict[str, Any]:
    """Return `statement`, or raise where it has not the shape that the schema asks for.

    Raises:
        StatementError: names the field, and what is wrong with it.
    """
    shape = load_validator(SCHEMA_FILE.name)
    if isinstance(statement, dict) and statement.get("schema") != shape.schema["$id"]:
        raise StatementError(
            f"schema={statement.get('schema')!s:.80}: this version knows {shape.schema['$id']}; use the version of "
            "hf_dpzo that wrote it."
        )
    error = jsonschema.exceptions.best_match(shape.iter_errors(statement))
    if error is not None:
        raise StatementError(f"{error.json_path.removeprefix('$.')}: {error.message:.200}; write the file anew.")
    return statement
