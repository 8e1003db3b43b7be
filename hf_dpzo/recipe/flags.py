"""How the fields of a recipe are spelled on the command line, through which all of them go."""

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser

from hf_dpzo.arguments.foreign import refuse_foreign_names
from hf_dpzo.recipe.spelling import mark_hyphens


# What argparse calls the types of numbers, what is wrong with other values, and what to do.
_NUMBERS = {
    "float": ("it is no number", "write it like 2.5 or 1e-5"),
    "int": ("it is no whole number", "write it in digits, like 160"),
}


_NO_FLAG = "no flag takes it; one that is no list takes one value, and text with spaces stands in quotes"


_SEVERAL = "where a flag takes several, write them with spaces between them, like 26 27"


# How fields that are mappings are written.
MAPPINGS = {
    "label_words": "{class: word}",
    "where": "{column: value}",
    "columns": "{name of the task: name in the data}",
    "perturbation_scales": "{part of a name: scale}",
}


# A value of each as it is typed on a command line.
JSON_EXAMPLES = {
    "label_words": '{"0": " bad", "1": " good"}',
    "where": '{"source": "web"}',
    "columns": '{"messages": "conversations"}',
}


class FieldParser(HfArgumentParser):
    """Raises `ValueError` with one sentence, where argparse would print all flags and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError` with `message`."""
        sentence = re.sub(r"^argument --(.+?)(/.+?)?: ", r"\1: ", message)
        sentence = re.sub(r"^unrecognized arguments: (.+)$", rf"\1: {_NO_FLAG}", sentence)
        sentence = re.sub(r"^(\w+): invalid int value: (.+,.+)$", rf"\1=\2: {_NUMBERS['int'][0]}; {_SEVERAL}", sentence)
        for kind, (fault, remedy) in _NUMBERS.items():
            sentence = re.sub(rf"^(\w+): invalid {kind} value: (.+)$", rf"\1=\2: {fault}; {remedy}", sentence)
        raise ValueError(f"{sentence}.")


def spell_field(name: str, value: Any) -> list[str]:
    """Return one field of a recipe as command-line arguments; none for `None`.

    >>> spell_field("lora_layers", [1, 2]), spell_field("paper_noise", True), spell_field("where", {"a": 1})
    (['--lora_layers', '1', '2'], ['--paper_noise=true'], ['--where={"a": 1}'])
    """
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *mark_hyphens([str(item) for item in value])]
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]


def refuse_other_kinds(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Raise `ValueError` for a mapping of a recipe where a field is a list, and for a list of several elsewhere."""
    lists = {action.dest: action.nargs in ("+", "*") for action in parser._actions}
    for name, value in values.items():
        takes_list = lists.get(name, True)  # Of a name that is no field, more is said later.
        if isinstance(value, Mapping) and takes_list:
            items = ", ".join(map(str, value))
            raise ValueError(f"{name}={{{items}}}: it is a list, and no mapping; write [{items}].")
        if isinstance(value, list) and len(value) != 1 and not takes_list:
            items = ", ".join(map(str, value))
            told = f"a mapping; write {MAPPINGS[name]}" if name in MAPPINGS else "one value"
            raise ValueError(f"{name}=[{items}]: it is no list, but {told}.")


def name_flag(argument: str) -> str | None:
    """Return the field that a command-line argument sets; `None` for one that is a value.

    >>> name_flag("--max-steps=10"), name_flag("--no_paper_noise"), name_flag("10")
    ('max_steps', 'paper_noise', None)
    """
    if not argument.startswith("--"):
        return None
    return argument.removeprefix("--").split("=")[0].replace("-", "_").removeprefix("no_")


def refuse_unknown_flags(arguments: Sequence[str], kinds: Sequence[type]) -> None:
    """Raise `ValueError` for a flag that is no field of the dataclasses `kinds`."""
    known = {entry.name for kind in kinds for entry in fields(kind) if entry.init}
    for argument in arguments:
        name = name_flag(argument)
        if name is not None and name not in known:
            refuse_foreign_names([name], known)
            written = argument.removeprefix("--").split("=")[0].replace("-", "_")
            close = difflib.get_close_matches(written, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see hf-dpzo train --help."
            raise ValueError(f"{written}: there is no such field; {hint}")


def parse_json_object(name: str, text: str | None) -> dict[str, Any]:
    """Return the JSON object in `text`, the value of the field `name`; an empty one for `None`."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{name}={text!r}: it must be a mapping, on the command line as JSON, such as '{JSON_EXAMPLES[name]}'."
        )
    return value
