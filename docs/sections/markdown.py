"""Markdown, written by code."""

import inspect
import re
from collections.abc import Iterable
from typing import Any


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    r"""Return a table.

    >>> table(["a", "b"], [["1", "2"]])
    '| a | b |\n| --- | --- |\n| 1 | 2 |\n'
    """
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plain(text: str | None) -> str:
    r"""Return a text in which no character means anything to Markdown.

    >>> plain("one | of\n  a_b and <c>")
    'one \\| of a\\_b and \\<c\\>'
    """
    return re.sub(r"([\\`*_{}\[\]<>|$#~])", r"\\\1", " ".join((text or "").split()))


def code(value: Any) -> str:
    r"""Return a value as code that may stand in a table.

    >>> code("a|b")
    '`a\\|b`'
    """
    return f"`{str(value).replace('|', chr(92) + '|')}`"


def kind(annotation: Any) -> str:
    """Return what a field takes, in a word or two.

    >>> kind(float | None), kind(list[str] | None), kind("int")
    ('float', 'list[str]', 'int')
    """
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    parts = [part.strip() for part in re.sub(r"(typing|collections\.abc)\.", "", text).split("|")]
    return " or ".join(part for part in parts if part != "None")
