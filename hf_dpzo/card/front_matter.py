"""The YAML at the head of a stranger's card, checked before it is parsed."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_dpzo.io.foreign import one_sentence


# An honest card takes one or two kilobytes, and four levels. PyYAML takes minutes for deep nesting.
MAX_FRONT_MATTER_BYTES, MAX_FRONT_MATTER_DEPTH = 1 << 16, 20


# The Hub's client takes these for arguments of its own, or for methods of what it builds.
_RESERVED = {"eval_results", "ignore_metadata_errors", *dir(ModelCardData)}


class CardError(ValueError):
    """A card whose head cannot be read, or can be read in more than one way."""


def parse_card(text: str) -> ModelCard:
    r"""Parse a card whose head has a single reading, and does not expand when it is parsed.

    Raises:
        CardError: the head is missing, too large or too deep, is no YAML, repeats a name, uses aliases, or holds what
            the Hub's client does not take.

    >>> parse_card("---\nlicense: mit\n---\ntext").data.license
    'mit'
    >>> parse_card("---\nlicense: mit\nlicense: other\n---\ntext")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    hf_dpzo.card.front_matter.CardError: README.md: its metadata have license twice, of which ...
    """
    _check_size(text)
    with one_sentence(
        "README.md: its metadata cannot be read", CardError, remedy="correct them, or take the card anew"
    ):
        block = REGEX_YAML_BLOCK.search(text).group(2)
        _check_events(yaml.parse(block, Loader=yaml.SafeLoader))
        _refuse_duplicate_names(yaml.compose(block, Loader=yaml.SafeLoader))
        card = ModelCard(text)
        # Values can also break what is made of them later.
        card.data.to_dict()
        str(card)
        return card


def _check_size(text: str) -> None:
    """Raise `CardError` unless the head begins the card and ends soon, before anything searches for its end."""
    head = text[: MAX_FRONT_MATTER_BYTES + 16]
    if re.match(r"\s*---[\r\n]", head) is None:
        raise CardError("README.md: it has no metadata at its head; take it anew.")
    # The Hub's client searches in a time that is quadratic in the number of empty lines.
    if re.search(r"[\r\n]---(?=[\r\n]|$)", head.lstrip()[3:]) is None or re.search(r"[\r\n]{100}", head):
        raise CardError(
            f"README.md: its metadata do not end within {MAX_FRONT_MATTER_BYTES} bytes, or hold many empty lines; "
            "shorten them."
        )


def list_tags(metadata: Mapping[str, Any]) -> list[str]:
    """Return the tags in `metadata`, whatever form they have there.

    >>> list_tags({"tags": ["a", 3]}), list_tags({"tags": "a"}), list_tags({"tags": 3})
    (['a'], ['a'], [])
    """
    tags = metadata.get("tags")
    listed = tags if isinstance(tags, list) else [tags]
    return [tag for tag in listed if isinstance(tag, str)]


def select_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a card's `metadata` another card may take over: no names that the Hub's client gives a meaning."""
    return {name: value for name, value in metadata.items() if name not in _RESERVED}


def _check_events(events: Iterator[yaml.Event]) -> None:
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise CardError("README.md: its metadata refer to other parts of themselves; write them out.")
        starts = isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent)
        depth += starts - isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent)
        if depth > MAX_FRONT_MATTER_DEPTH:
            raise CardError(f"README.md: its metadata have more than {MAX_FRONT_MATTER_DEPTH} levels; flatten them.")


def _refuse_duplicate_names(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_names(item)
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in node.value]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise CardError(
                f"README.md: its metadata have {twice:.50} twice, of which readers take different ones; remove one."
            )
        for _, value in node.value:
            _refuse_duplicate_names(value)
