"""Reads YAML so that names of classes and cells stay as they are written: YAML takes yes for true, and 01 for 1.

What is wrong with a document is said without any of its text: somebody may have named a table of private rows.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import yaml


# What a parser quotes of its own grammar, such as '<block end>' or ':'. Anything else that it quotes is the document's.
_GRAMMAR = re.compile(r"'(<[a-z ]+>|[^\w\s]|\\t)'")


class UnreadableYAMLError(ValueError):
    """A text that is not valid YAML. The message shows where, and none of the text."""


def read_yaml(text: str, *, as_written: Collection[str]) -> Any:
    """Return what a YAML document holds, and for the fields `as_written` of a mapping the texts as they are written.

    Raises:
        UnreadableYAMLError: it is not valid YAML.

    >>> read_yaml("{classes: [no, 01], label_words: {yes: ' ok'}, use_cpu: yes}", as_written=["classes", "label_words"])
    {'classes': ['no', '01'], 'label_words': {'yes': ' ok'}, 'use_cpu': True}
    """
    try:
        root, values = _parse(text)
    except Exception as error:  # YAML raises many of them, for dates that there are not and values without an end, too.
        fault = _describe_fault(error)
    else:
        fault = None
    if fault is not None:
        raise UnreadableYAMLError(fault)
    if isinstance(root, yaml.MappingNode) and isinstance(values, dict):
        values |= {
            key.value: _read_as_written(node)
            for key, node in root.value
            if key.value in as_written and values.get(key.value) is not None
        }
    return values


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _describe_fault(error: Exception) -> str:
    """Return what is wrong with a document, and where, in words of the parser alone.

    >>> _describe_fault(yaml.composer.ComposerError(None, None, "found undefined alias 'Smith'"))
    'it is not valid YAML (found undefined alias)'
    """
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    problem = getattr(error, "problem", None) or "a value is not of the kind that it looks like"
    quotes = re.finditer(r"""'[^']*'|"[^"]*"|['"]""", problem)
    foreign = next((quote.start() for quote in quotes if not _GRAMMAR.fullmatch(quote[0])), len(problem))
    return f"it is not valid YAML{place} ({problem[:foreign].strip()})"


def _read_as_written(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _read_as_written(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_read_as_written(item) for item in node.value]
    return node.value


def mark_hyphens(values: Sequence[str]) -> list[str]:
    r"""Return values of a flag, with a backslash before those that begin with a hyphen and would be flags.

    >>> mark_hyphens(["-neg", "-1", "pos"]), restore_hyphens(["\\-neg", "-1", "pos"])
    (['\\-neg', '-1', 'pos'], ['-neg', '-1', 'pos'])
    """
    return [rf"\{value}" if re.match(r"\\+-|-(?!\d+$|\d*\.\d+$)", value) else value for value in values]


def restore_hyphens(values: Sequence[str]) -> list[str]:
    """Return the values from which `mark_hyphens` made these."""
    return [value[1:] if re.match(r"\\+-", value) else value for value in values]
