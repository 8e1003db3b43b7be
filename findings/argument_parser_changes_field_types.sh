#!/usr/bin/env bash
# transformers 5.23.0: making an HfArgumentParser of a dataclass changes what the dataclass says of its own fields.
#
# The parser writes the type without None into the field itself, which belongs to the class. From then on
# dataclasses.fields() says list[str] where the class was written with list[str] | None, and says so to everybody in the
# process: whatever checks values, writes a schema or documents options by fields() takes None, the field's own default,
# for a value of a wrong type, but only if a parser was made before. The annotations of the class keep the old types.
#
# Seen:
#   before a parser: names: list[str] | None, share: float | None
#   after one:       names: list[str], share: float
#   annotations:     names: list[str] | None, share: float | None
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import dataclasses
import sys

from transformers import HfArgumentParser


@dataclasses.dataclass
class Options:
    names: list[str] | None = None
    share: float | None = None


def show(kind):
    return kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)


def describe():
    return ", ".join(f"{field.name}: {show(field.type)}" for field in dataclasses.fields(Options))


before = describe()
options, = HfArgumentParser(Options).parse_args_into_dataclasses(args=[])
after = describe()
annotations = ", ".join(f"{name}: {show(kind)}" for name, kind in Options.__annotations__.items())
print(f"  before a parser: {before}\n  after one:       {after}\n  annotations:     {annotations}")
assert options.names is None and options.share is None
whole = "names: list[str] | None, share: float | None"
sys.exit(not (before == annotations == whole and after == "names: list[str], share: float"))
PYTHON
