"""Reads YAML so that names of classes and cells stay as they are written: YAML takes yes for true, and 01 for 1."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import yaml


def read_yaml(text: str, *, as_written: Collection[str]) -> Any:
    """Return what a YAML document holds, and for the fields `as_written` of a mapping the texts as they are written.

    Raises:
        yaml.YAMLError: it is not valid YAML.

    >>> read_yaml("{classes: [no, 01], label_words: {yes: ' ok'}, use_cpu: yes}", as_written=["classes", "label_words"])
    {'classes': ['no', '01'], 'label_words': {'yes': ' ok'}, 'use_cpu': True}
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        values = None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()
    if isinstance(root, yaml.MappingNode):
        values |= {
            key.value: _read_as_written(node)
            for key, node in root.value
            if key.value in as_written and values.get(key.value) is not None
        }
    return values


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
